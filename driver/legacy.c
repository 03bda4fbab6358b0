// SPDX-License-Identifier: GPL-2.0
/*
 * The legacy protocol: a region with registers and a data section, of the type that
 * linux/vfio.h once called VFIO_REGION_TYPE_MIGRATION (3, subtype 1). A chunk is a piece of the
 * same stream that a data_fd carries. With region_framed each chunk begins with its own length,
 * and one that comes in another size than it left is refused.
 */

#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include "vfiomig_test.h"

#define REGION_TYPE	3
#define REGION_SUBTYPE	1
#define FRAME_MAGIC	0x6b6e7563U

enum {
	REG_DEVICE_STATE = 0,		/* u32 */
	REG_RESERVED = 4,		/* u32 */
	REG_PENDING_BYTES = 8,		/* u64, as those below */
	REG_DATA_OFFSET = 16,
	REG_DATA_SIZE = 24,
};

#define BITS_RUNNING	1U
#define BITS_SAVING	2U
#define BITS_RESUMING	4U
#define BITS_ALL	7U
#define BITS_ERROR	(BITS_SAVING | BITS_RESUMING)

struct frame {
	__le32 magic;
	__le32 number;
	__le64 bytes;			/* with the frame */
};

/* Called by open, with state_mutex. */
int vmt_legacy_open(struct vmt_dev *dev)
{
	struct vmt_legacy *legacy = &dev->legacy;

	if (!dev->legacy_type)
		return 0;
	legacy->data_bytes = PAGE_ALIGN(dev->config.region_data_bytes);
	legacy->data = vmalloc_user(legacy->data_bytes);
	legacy->reserved_bits = 0;
	legacy->serial = 0;
	legacy->chunk = 0;
	return legacy->data ? 0 : -ENOMEM;
}

void vmt_legacy_close(struct vmt_dev *dev)
{
	vfree(dev->legacy.data);
	dev->legacy.data = NULL;
}

size_t vmt_legacy_region_bytes(const struct vmt_dev *dev)
{
	return VMT_LEGACY_DATA + dev->legacy.data_bytes;
}

int vmt_legacy_caps(struct vmt_dev *dev, struct vfio_info_cap *caps)
{
	struct vfio_region_info_cap_type type = {
		.header = { .id = VFIO_REGION_INFO_CAP_TYPE, .version = 1 },
		.type = REGION_TYPE,
		.subtype = REGION_SUBTYPE,
	};
	struct vfio_region_info_cap_sparse_mmap *sparse;
	size_t size = struct_size(sparse, areas, 1);
	int err;

	err = vfio_info_add_capability(caps, &type.header, sizeof(type));
	if (err || !dev->config.region_mmap)
		return err;
	sparse = kzalloc(size, GFP_KERNEL);
	if (!sparse)
		return -ENOMEM;
	sparse->header.id = VFIO_REGION_INFO_CAP_SPARSE_MMAP;
	sparse->header.version = 1;
	sparse->nr_areas = 1;
	sparse->areas[0].offset = VMT_LEGACY_DATA;
	sparse->areas[0].size = dev->legacy.data_bytes;
	err = vfio_info_add_capability(caps, &sparse->header, size);
	kfree(sparse);
	return err;
}

/* No lock: under mmap_lock, and the data section lives as long as the device is open. */
int vmt_legacy_mmap(struct vmt_dev *dev, struct vm_area_struct *vma)
{
	unsigned long first = vma->vm_pgoff &
		(BIT_ULL(VMT_REGION_SHIFT - PAGE_SHIFT) - 1);
	unsigned long start = VMT_LEGACY_DATA >> PAGE_SHIFT;

	if (!dev->config.region_mmap || first < start)
		return -EINVAL;
	return remap_vmalloc_range(vma, dev->legacy.data, first - start);
}

/* The present session with a reference, or NULL. */
static struct vmt_session *present(struct vmt_dev *dev)
{
	struct vmt_session *session;

	if (mutex_lock_killable(&dev->state_mutex))
		return ERR_PTR(-EINTR);
	session = dev->session;
	if (session)
		vmt_session_get(session);
	vmt_unlock(dev);
	return session;
}

/* Under legacy.lock: chunks of an earlier session are forgotten. */
static void adopt(struct vmt_legacy *legacy, const struct vmt_session *session)
{
	if (legacy->serial == session->serial)
		return;
	legacy->serial = session->serial;
	legacy->chunk = 0;
	legacy->chunks = 0;
}

static int get_pending(struct vmt_dev *dev, struct vmt_session *session, u64 *value)
{
	/* This acknowledges the chunk that was there. */
	dev->legacy.chunk = 0;
	if (mutex_lock_killable(&session->lock))
		return -EINTR;
	*value = vmt_save_available(session);
	mutex_unlock(&session->lock);
	return 0;
}

static int make_chunk(struct vmt_dev *dev, struct vmt_session *session)
{
	struct vmt_legacy *legacy = &dev->legacy;
	size_t head = dev->config.region_framed ? sizeof(struct frame) : 0;
	struct frame *frame = legacy->data;
	struct kvec vec = {
		.iov_base = legacy->data + head,
		.iov_len = dev->config.region_data_bytes - head,
	};
	struct iov_iter to;
	ssize_t ret;

	iov_iter_kvec(&to, ITER_DEST, &vec, 1, vec.iov_len);
	ret = vmt_save_read(session, &to, false);
	if (ret == -ENOMSG)
		ret = 0;
	if (ret <= 0)
		return ret;
	legacy->chunk = ret + head;
	if (head) {
		frame->magic = cpu_to_le32(FRAME_MAGIC);
		frame->number = cpu_to_le32(legacy->chunks);
		frame->bytes = cpu_to_le64(legacy->chunk);
	}
	legacy->chunks++;
	return 0;
}

/* Under legacy.lock. */
static int get_data_register(struct vmt_dev *dev, struct vmt_session *session, u64 reg,
			     u64 *value)
{
	int err = 0;

	adopt(&dev->legacy, session);
	switch (reg) {
	case REG_PENDING_BYTES:
		return session->loading ? 0 : get_pending(dev, session, value);
	case REG_DATA_OFFSET:
		if (!session->loading && !dev->legacy.chunk)
			err = make_chunk(dev, session);
		*value = VMT_LEGACY_DATA;
		return err;
	default:
		*value = session->loading ? 0 : dev->legacy.chunk;
		return 0;
	}
}

static int read_data_register(struct vmt_dev *dev, u64 reg, u64 *value)
{
	struct vmt_session *session = present(dev);
	int err;

	*value = 0;
	if (IS_ERR(session))
		return PTR_ERR(session);
	if (!session)
		return 0;
	err = -EINTR;
	if (!mutex_lock_killable(&dev->legacy.lock)) {
		err = get_data_register(dev, session, reg, value);
		mutex_unlock(&dev->legacy.lock);
	}
	vmt_session_put(session);
	return err;
}

static int feed(struct vmt_session *session, void *data, size_t bytes)
{
	struct kvec vec = { .iov_base = data, .iov_len = bytes };
	struct iov_iter from;
	ssize_t ret;

	iov_iter_kvec(&from, ITER_SOURCE, &vec, 1, bytes);
	while (iov_iter_count(&from)) {
		ret = vmt_load_write(session, &from, false);
		if (ret < 0)
			return ret;
		if (!ret)
			return -EINTR;
	}
	return 0;
}

static int take_chunk(struct vmt_dev *dev, struct vmt_session *session, u64 bytes)
{
	struct vmt_legacy *legacy = &dev->legacy;
	struct frame frame;
	size_t head = 0;

	if (bytes > dev->config.region_data_bytes)
		return -EINVAL;
	if (dev->config.region_framed) {
		head = sizeof(frame);
		memcpy(&frame, legacy->data, head);
		if (bytes < head || frame.magic != cpu_to_le32(FRAME_MAGIC) ||
		    frame.number != cpu_to_le32(legacy->chunks) ||
		    frame.bytes != cpu_to_le64(bytes))
			return -EINVAL;
	}
	legacy->chunks++;
	return feed(session, legacy->data + head, bytes - head);
}

static int write_data_size(struct vmt_dev *dev, u64 value)
{
	struct vmt_session *session = present(dev);
	int err = -EINVAL;

	if (IS_ERR_OR_NULL(session))
		return session ? PTR_ERR(session) : -EINVAL;
	if (mutex_lock_killable(&dev->legacy.lock)) {
		err = -EINTR;
	} else {
		adopt(&dev->legacy, session);
		if (session->loading)
			err = take_chunk(dev, session, value);
		mutex_unlock(&dev->legacy.lock);
	}
	vmt_session_put(session);
	return err;
}

static u32 bits_of(enum vfio_device_mig_state state)
{
	switch (state) {
	case VFIO_DEVICE_STATE_RUNNING:
		return BITS_RUNNING;
	case VFIO_DEVICE_STATE_PRE_COPY:
		return BITS_RUNNING | BITS_SAVING;
	case VFIO_DEVICE_STATE_STOP_COPY:
		return BITS_SAVING;
	case VFIO_DEVICE_STATE_RESUMING:
		return BITS_RESUMING;
	case VFIO_DEVICE_STATE_STOP:
		return 0;
	default:
		return BITS_ERROR;
	}
}

/* ERROR for bits that no one may set. */
static enum vfio_device_mig_state state_of(u32 bits)
{
	switch (bits & BITS_ALL) {
	case 0:
		return VFIO_DEVICE_STATE_STOP;
	case BITS_RUNNING:
		return VFIO_DEVICE_STATE_RUNNING;
	case BITS_RUNNING | BITS_SAVING:
		return VFIO_DEVICE_STATE_PRE_COPY;
	case BITS_SAVING:
		return VFIO_DEVICE_STATE_STOP_COPY;
	case BITS_RESUMING:
		return VFIO_DEVICE_STATE_RESUMING;
	default:
		return VFIO_DEVICE_STATE_ERROR;
	}
}

static bool is_arc(enum vfio_device_mig_state from, enum vfio_device_mig_state to)
{
	switch (from) {
	case VFIO_DEVICE_STATE_RUNNING:
		return true;
	case VFIO_DEVICE_STATE_STOP:
		return to != VFIO_DEVICE_STATE_PRE_COPY;
	case VFIO_DEVICE_STATE_PRE_COPY:
		return to != VFIO_DEVICE_STATE_RESUMING;
	case VFIO_DEVICE_STATE_STOP_COPY:
	case VFIO_DEVICE_STATE_RESUMING:
		return to == VFIO_DEVICE_STATE_STOP || to == VFIO_DEVICE_STATE_RUNNING;
	default:
		return false;
	}
}

static int write_device_state(struct vmt_dev *dev, u32 bits)
{
	enum vfio_device_mig_state to = state_of(bits);
	struct file *file;
	int err = 0;

	if (to == VFIO_DEVICE_STATE_ERROR)
		return -EINVAL;
	if (mutex_lock_killable(&dev->state_mutex))
		return -EINTR;
	if (to != dev->state)
		err = is_arc(dev->state, to) ? vmt_step(dev, to, &file) : -EINVAL;
	if (!err)
		dev->legacy.reserved_bits = bits & ~BITS_ALL;
	vmt_unlock(dev);
	return err;
}

static int read_device_state(struct vmt_dev *dev, u32 *bits)
{
	int err = vmt_fault(dev, VMT_AT_GET, 0, false);

	if (err)
		return err;
	if (mutex_lock_killable(&dev->state_mutex))
		return -EINTR;
	*bits = bits_of(dev->state) | dev->legacy.reserved_bits;
	vmt_unlock(dev);
	return 0;
}

static ssize_t read_data(struct vmt_dev *dev, char __user *buf, size_t count, u64 offset)
{
	if (offset >= dev->legacy.data_bytes)
		return -EINVAL;
	count = min_t(u64, count, dev->legacy.data_bytes - offset);
	return copy_to_user(buf, dev->legacy.data + offset, count) ? -EFAULT : count;
}

static ssize_t write_data(struct vmt_dev *dev, const char __user *buf, size_t count, u64 offset)
{
	if (offset >= dev->legacy.data_bytes)
		return -EINVAL;
	count = min_t(u64, count, dev->legacy.data_bytes - offset);
	return copy_from_user(dev->legacy.data + offset, buf, count) ? -EFAULT : count;
}

ssize_t vmt_legacy_read(struct vmt_dev *dev, char __user *buf, size_t count, u64 offset)
{
	u32 narrow = 0;
	u64 wide;
	int err = 0;

	if (offset >= VMT_LEGACY_DATA)
		return read_data(dev, buf, count, offset - VMT_LEGACY_DATA);
	if (offset == REG_DEVICE_STATE || offset == REG_RESERVED) {
		if (count != sizeof(narrow))
			return -EINVAL;
		if (offset == REG_DEVICE_STATE)
			err = read_device_state(dev, &narrow);
		if (err)
			return err;
		return copy_to_user(buf, &narrow, count) ? -EFAULT : count;
	}
	if (offset % sizeof(wide) || offset > REG_DATA_SIZE || count != sizeof(wide))
		return -EINVAL;
	err = read_data_register(dev, offset, &wide);
	if (err)
		return err;
	return copy_to_user(buf, &wide, count) ? -EFAULT : count;
}

ssize_t vmt_legacy_write(struct vmt_dev *dev, const char __user *buf, size_t count, u64 offset)
{
	u32 narrow;
	u64 wide;

	if (offset >= VMT_LEGACY_DATA)
		return write_data(dev, buf, count, offset - VMT_LEGACY_DATA);
	if (offset == REG_DEVICE_STATE && count == sizeof(narrow)) {
		if (copy_from_user(&narrow, buf, count))
			return -EFAULT;
		return write_device_state(dev, narrow) ?: count;
	}
	if (offset == REG_DATA_SIZE && count == sizeof(wide)) {
		if (copy_from_user(&wide, buf, count))
			return -EFAULT;
		return write_data_size(dev, wide) ?: count;
	}
	return -EINVAL;
}
