// SPDX-License-Identifier: GPL-2.0
/* What a device holds: generated pages, literal pages, the header, the digest. */

#include <linux/bitops.h>
#include <linux/math64.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/string.h>

#include "vfiomig_test.h"

#define HEADER_MAGIC	0x545345544d464956ULL	/* "VIFMTEST" */
#define HEADER_VERSION	1
#define RECORD_MAGIC	0x444f4345524d4956ULL	/* "VIMRECOD" */

#define ODD_A	0x9e3779b97f4a7c15ULL
#define ODD_B	0xbf58476d1ce4e5b9ULL
#define ODD_C	0x94d049bb133111ebULL

static u64 mix(u64 x)
{
	x = (x ^ (x >> 30)) * ODD_B;
	x = (x ^ (x >> 27)) * ODD_C;
	return x ^ (x >> 31);
}

static u64 hash(u64 start, const void *bytes, size_t count)
{
	const __le64 *word = bytes;
	u64 h = mix(start + ODD_A);
	size_t i;

	for (i = 0; i < count / sizeof(*word); i++)
		h = (rol64(h, 29) ^ le64_to_cpu(word[i])) * ODD_A;
	return mix(h);
}

struct vmt_state *vmt_state_new(const struct vmt_config *config)
{
	struct vmt_state *state = kzalloc(sizeof(*state), GFP_KERNEL_ACCOUNT);

	if (!state)
		return NULL;
	kref_init(&state->ref);
	xa_init(&state->pages);
	state->bytes = config->state_bytes;
	state->seed = config->seed;
	state->zero_percent = config->zero_percent;
	state->headless = state->bytes < sizeof(struct vmt_header);
	return state;
}

static void state_release(struct kref *ref)
{
	struct vmt_state *state = container_of(ref, struct vmt_state, ref);
	unsigned long index;
	void *page;

	xa_for_each(&state->pages, index, page) {
		kfree(page);
		cond_resched();
	}
	xa_destroy(&state->pages);
	kfree(state);
}

void vmt_state_get(struct vmt_state *state)
{
	kref_get(&state->ref);
}

void vmt_state_put(struct vmt_state *state)
{
	if (state)
		kref_put(&state->ref, state_release);
}

/* Only while nobody else has the state. The rest of the page is zero. */
int vmt_state_set_literal(struct vmt_state *state, u64 page, const u8 *content, size_t bytes)
{
	u8 *copy = xa_load(&state->pages, page);
	int err;

	if (copy) {
		memcpy(copy, content, bytes);
		memset(copy + bytes, 0, VMT_PAGE - bytes);
		return 0;
	}
	if (state->literals >= VMT_LITERALS_MOST)
		return -ENOSPC;
	copy = kzalloc(VMT_PAGE, GFP_KERNEL_ACCOUNT);
	if (!copy)
		return -ENOMEM;
	memcpy(copy, content, bytes);
	err = xa_err(xa_store(&state->pages, page, copy, GFP_KERNEL_ACCOUNT));
	if (err) {
		kfree(copy);
		return err;
	}
	state->literals++;
	return 0;
}

void vmt_state_drop_literal(struct vmt_state *state, u64 page)
{
	void *copy;

	if (!state->literals)
		return;
	copy = xa_erase(&state->pages, page);
	if (copy)
		state->literals--;
	kfree(copy);
}

/* The k-th write of a device goes to page k modulo its pages: so a number says which were when. */
void vmt_view_set(struct vmt_view *view, u64 writes)
{
	u64 pages = vmt_pages(view->state);

	view->writes = writes;
	view->laps = 0;
	view->edge = 0;
	if (pages)
		view->laps = div64_u64_rem(writes, pages, &view->edge);
}

u64 vmt_view_generation(const struct vmt_view *view, u64 page)
{
	return view->laps + (page < view->edge);
}

static bool is_blank(const struct vmt_state *state, u64 page, u64 generation)
{
	u32 roll;

	if (!state->zero_percent || !page || generation)
		return false;
	div_u64_rem(mix(state->seed ^ mix(page)) >> 1, 100, &roll);
	return roll < state->zero_percent;
}

static void generate(u64 key, __le64 *out)
{
	unsigned int i;

	for (i = 0; i < VMT_PAGE / sizeof(*out); i++) {
		key += ODD_A;
		out[i] = cpu_to_le64((key ^ (key >> 32)) * ODD_B);
	}
}

/* Fills out, VMT_PAGE bytes; what is beyond the end of the state, and a header, is zero. */
void vmt_page(const struct vmt_state *state, u64 page, u64 generation, u8 *out)
{
	u64 start = page << VMT_PAGE_SHIFT;
	const u8 *literal = NULL;

	if (state->literals)
		literal = xa_load((struct xarray *)&state->pages, page);
	if (literal)
		memcpy(out, literal, VMT_PAGE);
	else if (is_blank(state, page, generation))
		memset(out, 0, VMT_PAGE);
	else
		generate(mix(state->seed + mix(page + ODD_A) + mix(generation) * ODD_C),
			 (__le64 *)out);
	if (!page && !state->headless)
		memset(out, 0, sizeof(struct vmt_header));
	if (state->bytes - start < VMT_PAGE)
		memset(out + (state->bytes - start), 0, VMT_PAGE - (state->bytes - start));
}

static __le64 header_checksum(const struct vmt_header *header)
{
	struct vmt_header copy = *header;

	memset(copy.noise, 0, sizeof(copy.noise));
	copy.checksum = 0;
	return cpu_to_le64(hash(0, &copy, sizeof(copy)));
}

void vmt_header_seal(struct vmt_header *header)
{
	header->checksum = header_checksum(header);
}

void vmt_header_make(const struct vmt_view *view, struct vmt_header *header)
{
	*header = (struct vmt_header) {
		.magic = cpu_to_le64(HEADER_MAGIC),
		.version = cpu_to_le32(HEADER_VERSION),
		.zero_percent = view->state->zero_percent,
		.seed = cpu_to_le64(view->state->seed),
		.scratch = cpu_to_le64(view->scratch),
		.state_bytes = cpu_to_le64(view->state->bytes),
		.writes = cpu_to_le64(view->writes),
		.damage = cpu_to_le64(view->state->damage),
	};
	vmt_header_seal(header);
}

bool vmt_header_good(const struct vmt_header *header)
{
	u64 bytes = le64_to_cpu(header->state_bytes);

	return header->magic == cpu_to_le64(HEADER_MAGIC) &&
	       header->version == cpu_to_le32(HEADER_VERSION) &&
	       header->zero_percent <= 100 && header->live <= 1 &&
	       bytes >= sizeof(*header) && bytes <= VMT_STATE_MOST &&
	       header->checksum == header_checksum(header);
}

static __le64 record_checksum(const struct vmt_record *record)
{
	return cpu_to_le64(hash(1, record, offsetof(struct vmt_record, checksum)));
}

void vmt_record_make(struct vmt_record *record, enum vmt_record_kind kind, u64 ordinal)
{
	*record = (struct vmt_record) {
		.magic = cpu_to_le64(RECORD_MAGIC),
		.kind = cpu_to_le32(kind),
		.bytes = cpu_to_le32(VMT_PAGE),
		.ordinal = cpu_to_le64(ordinal),
	};
	record->checksum = record_checksum(record);
}

bool vmt_record_good(const struct vmt_record *record)
{
	u32 kind = le32_to_cpu(record->kind);

	return record->magic == cpu_to_le64(RECORD_MAGIC) &&
	       (kind == VMT_RECORD_PAGE || kind == VMT_RECORD_CLOSE) &&
	       record->bytes == cpu_to_le32(VMT_PAGE) &&
	       record->checksum == record_checksum(record);
}

/* Whether these can be the first bytes of a record. */
bool vmt_record_begins(const u8 *bytes, size_t count)
{
	__le64 magic = cpu_to_le64(RECORD_MAGIC);

	return !memcmp(bytes, &magic, min(count, sizeof(magic)));
}

/*
 * The sum over all pages of a hash of number and content. EINTR: a signal came first. EFBIG:
 * it would take so long that who removes the device would wait in vain for the reader.
 */
int vmt_digest(const struct vmt_view *view, u64 *digest)
{
	u64 pages = vmt_pages(view->state);
	u64 page, sum = 0;
	int err = 0;
	u8 *buf;

	if (view->state->bytes > VMT_DIGEST_MOST)
		return -EFBIG;
	buf = kmalloc(VMT_PAGE, GFP_KERNEL);
	if (!buf)
		return -ENOMEM;
	for (page = 0; page < pages; page++) {
		vmt_page(view->state, page, vmt_view_generation(view, page), buf);
		if (!page && !view->state->headless)
			vmt_header_make(view, (struct vmt_header *)buf);
		sum += hash(page + 2, buf, VMT_PAGE);
		if (signal_pending(current)) {
			err = -EINTR;
			break;
		}
		cond_resched();
	}
	kfree(buf);
	*digest = sum;
	return err;
}
