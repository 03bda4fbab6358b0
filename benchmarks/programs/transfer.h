/* What the programs here share: their command line, where bytes come from and go to, the figures.
 *
 *   PROGRAM send --src fd:N|file:PATH|memfd:SIZE --dst null|fd:N|file:PATH|tcp:[HOST:]PORT|unix:PATH
 *   PROGRAM recv --src fd:N|file:PATH|tcp:[HOST:]PORT|unix:PATH --dst null|memfd|fd:N|file:PATH
 *
 *   --buffer SIZE   bytes of one read (1M)        --slots N       buffers of the ring (4)
 *   --sync          fdatasync at the end          --direct        O_DIRECT, for a file
 *   --sndbuf SIZE   SO_SNDBUF of a socket         --checksum      XXH3-64 over the payload
 *
 * SIZE takes K, M, G (1024-based). The receiver listens, the sender connects, and tries for 10 s.
 * Each prints one line: bytes of the state, seconds, CPU seconds (user, sys), CLOCK_MONOTONIC when
 * it began and ended, and the largest resident set. Setting up is not in the figures.
 */
#ifndef TRANSFER_H
#define TRANSFER_H

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, CONNECT_ATTEMPTS = 1000, CONNECT_PAUSE_US = 10000 };

struct options {
    const char *src, *dst;
    size_t buffer_bytes, sndbuf_bytes;
    int slots;
    bool sending, sync, direct, checksum;
};

static inline void fail(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static inline void refuse(const char *what, const char *which)
{
    fprintf(stderr, "%s: %s (the head of transfer.h says what there is)\n", what, which);
    exit(2);
}

/* Returns what follows prefix in text, NULL if text begins otherwise. */
static inline const char *after(const char *text, const char *prefix)
{
    size_t length = strlen(prefix);
    return strncmp(text, prefix, length) ? NULL : text + length;
}

static inline size_t parse_size(const char *text)
{
    char *end;
    unsigned long long value = strtoull(text, &end, 10);
    const char *units = "KMG", *unit = *end ? strchr(units, *end) : NULL;

    if (end == text || (*end && (!unit || end[1])))
        refuse("not a size", text);
    return unit ? value << 10 * (unit - units + 1) : value;
}

static inline struct options parse_options(int count, char **words)
{
    struct options found = { .buffer_bytes = 1 << 20, .slots = 4 };

    if (count < 2 || (strcmp(words[1], "send") && strcmp(words[1], "recv")))
        refuse("say send or recv", count < 2 ? "nothing" : words[1]);
    found.sending = !strcmp(words[1], "send");
    for (int at = 2; at < count; at++) {
        const char *word = words[at], *value = words[at + 1];

        if (!strcmp(word, "--sync")) {
            found.sync = true;
            continue;
        }
        if (!strcmp(word, "--direct")) {
            found.direct = true;
            continue;
        }
        if (!strcmp(word, "--checksum")) {
            found.checksum = true;
            continue;
        }
        if (!value)
            refuse("unknown, or without its value", word);
        if (!strcmp(word, "--src"))
            found.src = value;
        else if (!strcmp(word, "--dst"))
            found.dst = value;
        else if (!strcmp(word, "--buffer"))
            found.buffer_bytes = parse_size(value);
        else if (!strcmp(word, "--sndbuf"))
            found.sndbuf_bytes = parse_size(value);
        else if (!strcmp(word, "--slots"))
            found.slots = (int)parse_size(value);
        else
            refuse("unknown option", word);
        at++;
    }
    if (!found.src || !found.dst)
        refuse("missing", "--src or --dst");
    if (found.buffer_bytes < PAGE || found.buffer_bytes % PAGE || found.slots < 1)
        refuse("out of range", "--buffer is a multiple of 4K, --slots at least 1");
    return found;
}

/* Addresses and sockets. */

struct address {
    union {
        struct sockaddr any;
        struct sockaddr_in tcp;
        struct sockaddr_un unix_path;
    };
    socklen_t length;
};

/* Whether text is tcp:[HOST:]PORT or unix:PATH; then its address. HOST is an IPv4 address. */
static inline bool parse_address(const char *text, struct address *found)
{
    const char *path = after(text, "unix:"), *port = after(text, "tcp:");

    memset(found, 0, sizeof *found);
    if (path) {
        found->unix_path.sun_family = AF_UNIX;
        snprintf(found->unix_path.sun_path, sizeof found->unix_path.sun_path, "%s", path);
        found->length = sizeof found->unix_path;
    } else if (port) {
        const char *colon = strrchr(port, ':');
        char host[64] = "127.0.0.1";

        if (colon) {
            snprintf(host, sizeof host, "%.*s", (int)(colon - port), port);
            port = colon + 1;
        }
        found->tcp.sin_family = AF_INET;
        found->tcp.sin_port = htons((uint16_t)atoi(port));
        if (inet_pton(AF_INET, host, &found->tcp.sin_addr) != 1)
            refuse("not an IPv4 address", host);
        found->length = sizeof found->tcp;
    }
    return path || port;
}

static inline int connect_to(const struct address *peer)
{
    for (int attempt = 0; attempt < CONNECT_ATTEMPTS; attempt++) {
        int fd = socket(peer->any.sa_family, SOCK_STREAM, 0);

        if (fd < 0)
            fail("socket");
        if (!connect(fd, &peer->any, peer->length))
            return fd;
        close(fd);
        usleep(CONNECT_PAUSE_US);
    }
    fail("connect");
    return -1;
}

static inline int accept_one(const struct address *own)
{
    int listener = socket(own->any.sa_family, SOCK_STREAM, 0), one = 1, fd;

    if (listener < 0)
        fail("socket");
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (own->any.sa_family == AF_UNIX)
        unlink(own->unix_path.sun_path);
    if (bind(listener, &own->any, own->length) || listen(listener, 1))
        fail("listen");
    fd = accept(listener, NULL, NULL);
    if (fd < 0)
        fail("accept");
    close(listener);
    return fd;
}

/* Sources and destinations. */

/* A memfd with so many bytes that are neither zero nor compressible (xorshift64). */
static inline int filled_memfd(size_t size)
{
    static uint64_t block[1 << 17];
    uint64_t word = 88172645463325252u;
    int fd = memfd_create("state", MFD_CLOEXEC);

    for (size_t done = 0, count; done < size; done += count) {
        for (size_t at = 0; at < sizeof block / sizeof *block; at++) {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            block[at] = word;
        }
        count = size - done < sizeof block ? size - done : sizeof block;
        if (write(fd, block, count) != (ssize_t)count)
            fail("memfd");
    }
    lseek(fd, 0, SEEK_SET);
    return fd;
}

static inline int open_source(const struct options *options)
{
    const char *text;
    struct address own;
    int fd = -1;

    if ((text = after(options->src, "fd:")))
        return atoi(text);
    if (options->sending && (text = after(options->src, "memfd:")))
        return filled_memfd(parse_size(text));
    if (!options->sending && parse_address(options->src, &own))
        return accept_one(&own);
    if (!(text = after(options->src, "file:")))
        refuse("no such source", options->src);
    else if ((fd = open(text, O_RDONLY | O_CLOEXEC)) < 0)
        fail(text);
    return fd;
}

/* Returns -1 for the null of a receiver: what is received goes nowhere. */
static inline int open_destination(const struct options *options)
{
    int flags = O_RDWR | O_CREAT | O_CLOEXEC | (options->direct ? O_DIRECT : 0), fd = -1;
    const char *text;
    struct address peer;

    if (!strcmp(options->dst, "null"))
        return options->sending ? open("/dev/null", O_WRONLY | O_CLOEXEC) : -1;
    if (!options->sending && !strcmp(options->dst, "memfd"))
        return memfd_create("destination", MFD_CLOEXEC);
    if (options->sending && parse_address(options->dst, &peer)) {
        fd = connect_to(&peer);
    } else if ((text = after(options->dst, "fd:"))) {
        fd = atoi(text);
        if (options->direct && fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_DIRECT))
            fail("O_DIRECT");
    } else if (!(text = after(options->dst, "file:"))) {
        refuse("no such destination", options->dst);
    } else if ((fd = open(text, flags, 0600)) < 0) {
        fail(text);
    }
    if (options->sndbuf_bytes) {
        int bytes = (int)options->sndbuf_bytes;
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    }
    return fd;
}

static inline mode_t kind_of(int fd)
{
    struct stat found;

    if (fstat(fd, &found))
        fail("fstat");
    return found.st_mode & S_IFMT;
}

/* Moving bytes. */

/* Memory on a page boundary, all of it in place: first touches belong to nobody's figures. */
static inline void *touched_memory(size_t bytes)
{
    void *memory;

    if (posix_memalign(&memory, PAGE, bytes))
        fail("memory");
    return memset(memory, 0, bytes);
}

static inline size_t read_some(int fd, void *memory, size_t count)
{
    ssize_t got;

    do
        got = read(fd, memory, count);
    while (got < 0 && errno == EINTR);
    if (got < 0)
        fail("read");
    return (size_t)got;
}

static inline void write_all(int fd, const void *memory, size_t count)
{
    const char *from = memory;

    while (count) {
        ssize_t done = write(fd, from, count);

        if (done <= 0) {
            if (done < 0 && errno == EINTR)
                continue;
            fail("write");
        }
        from += done;
        count -= (size_t)done;
    }
}

/* Make a file durable if asked; wait until the peer of a socket has taken everything. */
static inline void finish(const struct options *options, int fd)
{
    char byte;

    if (fd < 0)
        return;
    if (options->sync && fdatasync(fd))
        fail("fdatasync");
    if (options->sending && kind_of(fd) == S_IFSOCK) {
        shutdown(fd, SHUT_WR);
        while (read(fd, &byte, 1) > 0)
            ;
    }
}

/* Figures. */

struct meter {
    struct rusage usage;
    uint64_t at_ns;
};

static inline struct meter look(void)
{
    struct meter now;
    struct timespec clock;

    getrusage(RUSAGE_SELF, &now.usage);
    clock_gettime(CLOCK_MONOTONIC, &clock);
    now.at_ns = (uint64_t)clock.tv_sec * 1000000000u + (uint64_t)clock.tv_nsec;
    return now;
}

static inline double seconds_between(struct timeval from, struct timeval to)
{
    return (double)(to.tv_sec - from.tv_sec) + (double)(to.tv_usec - from.tv_usec) * 1e-6;
}

/* VmHWM: ru_maxrss would also count what the process was before exec(). */
static inline long peak_kib(void)
{
    FILE *status = fopen("/proc/self/status", "r");
    char line[256];
    long found = 0;

    while (status && fgets(line, sizeof line, status))
        if (sscanf(line, "VmHWM: %ld", &found) == 1)
            break;
    if (status)
        fclose(status);
    return found;
}

static inline void print_figures(struct meter from, uint64_t bytes)
{
    struct meter to = look();

    printf("bytes=%llu seconds=%.6f user=%.6f sys=%.6f start_ns=%llu end_ns=%llu peak_kib=%ld\n",
           (unsigned long long)bytes, (double)(to.at_ns - from.at_ns) * 1e-9,
           seconds_between(from.usage.ru_utime, to.usage.ru_utime),
           seconds_between(from.usage.ru_stime, to.usage.ru_stime),
           (unsigned long long)from.at_ns, (unsigned long long)to.at_ns, peak_kib());
}

#endif
