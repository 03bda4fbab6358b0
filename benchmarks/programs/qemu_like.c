/* QEMU's way to send and receive a device's state, without QEMU (command line: transfer.h).
 *
 * send: reads of 1 MiB; for each a 64-bit flag, a 64-bit size (both big endian) and the payload, all
 * copied through a stream buffer of 32 KiB that is written by writev() whenever it is full, or
 * when 64 pieces of it are waiting. recv: reads of 32 KiB, and payload written from that buffer.
 * The sizes are those of hw/vfio/migration.c and migration/qemu-file.c; the code is ours.
 */
#include "transfer.h"

enum { STREAM_BYTES = 32768, MAX_PIECES = 64 };
#define FLAG_END 0xffffffffef100001u
#define FLAG_DATA 0xffffffffef100004u

struct outgoing {
    _Alignas(PAGE) char buffer[STREAM_BYTES];
    struct iovec piece[MAX_PIECES];
    size_t used;
    int fd, pieces;
};

static void flush(struct outgoing *out)
{
    struct iovec *piece = out->piece;

    while (out->pieces) {
        ssize_t done = writev(out->fd, piece, out->pieces);

        if (done < 0) {
            if (errno == EINTR)
                continue;
            fail("writev");
        }
        while (out->pieces && (size_t)done >= piece->iov_len) {
            done -= (ssize_t)piece->iov_len;
            piece++;
            out->pieces--;
        }
        if (out->pieces) {
            piece->iov_base = (char *)piece->iov_base + done;
            piece->iov_len -= (size_t)done;
        }
    }
    out->used = 0;
}

/* Add what lies at the end of the buffer to the last piece where it follows on it. */
static void add_piece(struct outgoing *out, char *start, size_t count)
{
    struct iovec *last = out->piece + out->pieces - 1;

    if (out->pieces && (char *)last->iov_base + last->iov_len == start)
        last->iov_len += count;
    else
        out->piece[out->pieces++] = (struct iovec){ start, count };
}

static void put(struct outgoing *out, const void *memory, size_t count)
{
    const char *from = memory;

    while (count) {
        size_t room = STREAM_BYTES - out->used, part = count < room ? count : room;

        memcpy(out->buffer + out->used, from, part);
        add_piece(out, out->buffer + out->used, part);
        out->used += part;
        from += part;
        count -= part;
        if (out->used == STREAM_BYTES || out->pieces == MAX_PIECES)
            flush(out);
    }
}

static void put_be64(struct outgoing *out, uint64_t value)
{
    value = htobe64(value);
    put(out, &value, sizeof value);
}

static void send_state(const struct options *options)
{
    int source = open_source(options);
    static struct outgoing out;
    char *memory = touched_memory(options->buffer_bytes);
    uint64_t total = 0;
    size_t got;

    out.fd = open_destination(options);
    struct meter from = look();
    while ((got = read_some(source, memory, options->buffer_bytes))) {
        put_be64(&out, FLAG_DATA);
        put_be64(&out, got);
        put(&out, memory, got);
        total += got;
    }
    put_be64(&out, FLAG_END);
    flush(&out);
    finish(options, out.fd);
    print_figures(from, total);
}

struct incoming {
    _Alignas(PAGE) char buffer[STREAM_BYTES];
    size_t at, filled;
    int fd;
};

/* Make sure that something is in the buffer. */
static size_t available(struct incoming *in)
{
    if (in->at == in->filled) {
        in->at = 0;
        in->filled = read_some(in->fd, in->buffer, STREAM_BYTES);
        if (!in->filled) {
            fprintf(stderr, "the stream ends early\n");
            exit(1);
        }
    }
    return in->filled - in->at;
}

static uint64_t get_be64(struct incoming *in)
{
    uint64_t value;
    char *to = (char *)&value;

    for (size_t left = sizeof value; left;) {
        size_t ready = available(in), part = left < ready ? left : ready;

        memcpy(to, in->buffer + in->at, part);
        in->at += part;
        to += part;
        left -= part;
    }
    return be64toh(value);
}

static void receive_state(const struct options *options)
{
    int destination = open_destination(options);
    static struct incoming in;
    uint64_t total = 0;

    in.fd = open_source(options);
    available(&in);
    struct meter from = look();
    while (get_be64(&in) == FLAG_DATA) {
        uint64_t left = get_be64(&in);

        total += left;
        while (left) {
            size_t ready = available(&in), part = left < ready ? left : ready;

            if (destination >= 0)
                write_all(destination, in.buffer + in.at, part);
            in.at += part;
            left -= part;
        }
    }
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
