/* The system calls of vfiomig's own loop, in C and without Python (command line: transfer.h).
 *
 * send: a thread reads into page-aligned buffers that were touched before, and puts a header of 64
 * bytes in front of the payload; another writes header and payload with one call. In a file the
 * header takes a page, and payloads begin on pages; with --direct each buffer has a writer of its
 * own, so that several writes are under way. recv: reads what there is into one buffer, finds the
 * headers in it, and writes the payload from where it lies. --checksum: a running XXH3-64 of the
 * payload in each header, which recv verifies. Runs of zeros are not looked for.
 */
#include "transfer.h"

#include <pthread.h>
#include <semaphore.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

enum { MAX_SLOTS = 64, SOCKET_BYTES = 4 << 20, PIPE_BYTES = 1 << 20, HASHED = 1, LAST = 2 };
#define MAGIC 0x676e69726e6c70u

/* skip: bytes between header and payload; the payload is filled up to a multiple of skip + 64. */
struct header {
    uint64_t magic, sequence, length, checksum;
    uint32_t flags, skip;
    char reserved[24];
};
_Static_assert(sizeof(struct header) == 64, "a header has 64 bytes");

struct slot {
    sem_t full, empty;
    char *start, *payload;
    size_t length;
    off_t offset;
    bool last;
};

struct ring {
    struct options options;
    int fd, slots;
    bool in_place;
    size_t lead;
    struct slot slot[MAX_SLOTS];
};

struct writer {
    pthread_t thread;
    struct ring *ring;
    int first, step;
};

static void wait_for(sem_t *semaphore)
{
    while (sem_wait(semaphore))
        ;
}

static void write_slot(const struct ring *ring, const struct slot *slot)
{
    size_t done = 0;

    if (!ring->in_place) {
        write_all(ring->fd, slot->start, slot->length);
        return;
    }
    while (done < slot->length) {
        ssize_t part = pwrite(ring->fd, slot->start + done, slot->length - done,
                              slot->offset + (off_t)done);
        if (part <= 0)
            fail("pwrite");
        done += (size_t)part;
    }
}

/* Write every step-th slot, from the first, until one says that it is the last. */
static void *write_slots(void *argument)
{
    const struct writer *own = argument;
    struct ring *ring = own->ring;

    for (uint64_t at = (uint64_t)own->first;; at += (uint64_t)own->step) {
        struct slot *slot = &ring->slot[at % (uint64_t)ring->slots];

        wait_for(&slot->full);
        write_slot(ring, slot);
        if (slot->last)
            return NULL;
        sem_post(&slot->empty);
    }
}

static void make_ring(struct ring *ring)
{
    size_t bytes = PAGE + ring->options.buffer_bytes + PAGE;

    for (int at = 0; at < ring->slots; at++) {
        struct slot *slot = &ring->slot[at];

        slot->payload = (char *)touched_memory(bytes) + PAGE;
        slot->start = slot->payload - ring->lead;
        sem_init(&slot->full, 0, 0);
        sem_init(&slot->empty, 0, 1);
    }
}

static void suit_destination(const struct options *options, int fd)
{
    mode_t kind = kind_of(fd);

    if (kind == S_IFIFO)
        fcntl(fd, F_SETPIPE_SZ, PIPE_BYTES);
    if (kind == S_IFSOCK && !options->sndbuf_bytes) {
        int bytes = SOCKET_BYTES, domain = 0;
        socklen_t length = sizeof domain;

        getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length);
        if (domain == AF_UNIX) /* TCP finds its own size */
            setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    }
}

/* Put the header in front of the payload, and zeros behind it. */
static void frame(const struct ring *ring, struct slot *slot, struct header header)
{
    size_t filled = (header.length + ring->lead - 1) / ring->lead * ring->lead;

    memcpy(slot->start, &header, sizeof header);
    memset(slot->payload + header.length, 0, filled - header.length);
    slot->length = ring->lead + filled;
}

/* Wait for the next slot to be free, and give it to its writer once it is filled. */
static struct slot *next_slot(struct ring *ring, uint64_t sequence)
{
    struct slot *slot = &ring->slot[sequence % (uint64_t)ring->slots];

    wait_for(&slot->empty);
    return slot;
}

/* Fill slots from the source, to its end; then tell each writer. Returns the bytes of the state. */
static uint64_t read_slots(struct ring *ring, int source, int writers)
{
    struct header header = { .magic = MAGIC, .skip = (uint32_t)(ring->lead - sizeof header) };
    uint64_t total = 0;
    off_t offset = 0;
    XXH3_state_t *hash = XXH3_createState();

    XXH3_64bits_reset(hash);
    header.flags = ring->options.checksum ? HASHED : 0;
    do {
        struct slot *slot = next_slot(ring, header.sequence);

        header.length = read_some(source, slot->payload, ring->options.buffer_bytes);
        if (!header.length)
            header.flags |= LAST;
        if (ring->options.checksum) {
            XXH3_64bits_update(hash, slot->payload, header.length);
            header.checksum = XXH3_64bits_digest(hash);
        }
        frame(ring, slot, header);
        slot->offset = offset;
        slot->last = !header.length;
        offset += (off_t)slot->length;
        total += header.length;
        header.sequence++;
        sem_post(&slot->full);
    } while (header.length);
    while (--writers) {
        struct slot *slot = next_slot(ring, header.sequence++);

        slot->length = 0;
        slot->last = true;
        sem_post(&slot->full);
    }
    XXH3_freeState(hash);
    return total;
}

static void send_state(const struct options *options)
{
    static struct ring ring;
    static struct writer writers[MAX_SLOTS];
    int source = open_source(options), count;
    uint64_t total;

    if (options->slots > MAX_SLOTS)
        refuse("at most 64", "--slots");
    ring.options = *options;
    ring.slots = options->slots;
    ring.fd = open_destination(options);
    ring.in_place = options->direct;
    ring.lead = kind_of(ring.fd) == S_IFREG ? PAGE : sizeof(struct header);
    suit_destination(options, ring.fd);
    make_ring(&ring);
    count = ring.in_place ? ring.slots : 1;

    struct meter from = look();
    for (int at = 0; at < count; at++) {
        writers[at] = (struct writer){ .ring = &ring, .first = at, .step = count };
        if (pthread_create(&writers[at].thread, NULL, write_slots, &writers[at]))
            fail("thread");
    }
    total = read_slots(&ring, source, count);
    for (int at = 0; at < count; at++)
        pthread_join(writers[at].thread, NULL);
    finish(options, ring.fd);
    print_figures(from, total);
}

/* What was received and not yet looked at: filled - at bytes, from at. */
struct incoming {
    int fd;
    size_t at, filled, size;
    char *buffer;
};

static void broken(const char *what)
{
    fprintf(stderr, "the stream is broken: %s\n", what);
    exit(1);
}

/* Receive what there is behind what is left, which goes to the front of the buffer. */
static void receive_more(struct incoming *in)
{
    size_t left = in->filled - in->at, got;

    memmove(in->buffer, in->buffer + in->at, left);
    got = read_some(in->fd, in->buffer + left, in->size - left);
    if (!got)
        broken("it ends early");
    in->at = 0;
    in->filled = left + got;
}

static struct header get_header(struct incoming *in)
{
    struct header found;

    while (in->filled - in->at < sizeof found)
        receive_more(in);
    memcpy(&found, in->buffer + in->at, sizeof found);
    in->at += sizeof found;
    if (found.magic != MAGIC)
        broken("no header");
    return found;
}

/* Pass count bytes on, to destination and hash where there are any. */
static void forward(struct incoming *in, size_t count, int destination, XXH3_state_t *hash)
{
    while (count) {
        if (in->at == in->filled)
            receive_more(in);
        size_t ready = in->filled - in->at, part = count < ready ? count : ready;

        if (hash)
            XXH3_64bits_update(hash, in->buffer + in->at, part);
        if (destination >= 0)
            write_all(destination, in->buffer + in->at, part);
        in->at += part;
        count -= part;
    }
}

static void receive_state(const struct options *options)
{
    int destination = open_destination(options);
    struct incoming in = { .fd = open_source(options), .size = options->buffer_bytes };
    XXH3_state_t *hash = XXH3_createState();
    struct header header;
    uint64_t total = 0, sequence = 0;

    in.buffer = touched_memory(in.size);
    XXH3_64bits_reset(hash);
    receive_more(&in);
    struct meter from = look();
    do {
        header = get_header(&in);
        size_t lead = header.skip + sizeof header;

        forward(&in, header.skip, -1, NULL);
        forward(&in, header.length, destination, header.flags & HASHED ? hash : NULL);
        forward(&in, (lead - header.length % lead) % lead, -1, NULL);
        if (header.sequence != sequence++)
            broken("a frame is missing");
        if (header.flags & HASHED && XXH3_64bits_digest(hash) != header.checksum)
            broken("its checksum is wrong");
        total += header.length;
    } while (!(header.flags & LAST));
    finish(options, destination);
    print_figures(from, total);
}

int main(int count, char **words)
{
    struct options options = parse_options(count, words);

    if (options.sending)
        send_state(&options);
    else
        receive_state(&options);
    return 0;
}
