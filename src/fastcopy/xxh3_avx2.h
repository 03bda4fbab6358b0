#include <stddef.h>

/* XXH3_64bits_update(), for processors with AVX2 only. */
int xxh3_update_avx2(void *state, const void *data, size_t count);
