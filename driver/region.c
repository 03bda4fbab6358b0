// SPDX-License-Identifier: GPL-2.0
/* The regions: BAR0, and the migration region of the legacy type. */

#include <linux/uaccess.h>

#include "vfiomig_test.h"

#define BAR_BYTES	4096

enum bar_register {
	BAR_MAGIC_REG = 0x00,
	BAR_DIGEST = 0x08,
	BAR_HELD_BYTES = 0x10,
	BAR_SEED = 0x18,
	BAR_SCRATCH = 0x20,
	BAR_IOVA = 0x28,
	BAR_LENGTH = 0x30,
};

u32 vmt_num_regions(const struct vmt_dev *dev)
{
	return VMT_NUM_REGIONS + (dev->legacy_type && dev->config.capabilities);
}

static int bar_read(struct vmt_dev *dev, u64 offset, u64 *value)
{
	struct vmt_view view;
	int err;

	*value = 0;
	if (offset == BAR_MAGIC_REG) {
		memcpy(value, "VFIOMIGT", sizeof(*value));
		*value = le64_to_cpu((__force __le64)*value);
		return 0;
	}
	if (offset == BAR_IOVA) {
		*value = READ_ONCE(dev->bar_iova);
		return 0;
	}
	if (offset > BAR_SCRATCH)
		return 0;
	err = vmt_view_now(dev, &view);
	if (err)
		return err;
	if (offset == BAR_DIGEST)
		err = vmt_digest(&view, value);
	else if (offset == BAR_HELD_BYTES)
		*value = view.state->bytes;
	else if (offset == BAR_SEED)
		*value = view.state->seed;
	else
		*value = view.scratch;
	vmt_state_put(view.state);
	return err;
}

static int bar_write(struct vmt_dev *dev, u64 offset, u64 value)
{
	switch (offset) {
	case BAR_SCRATCH:
		if (mutex_lock_killable(&dev->state_mutex))
			return -EINTR;
		dev->held.scratch = value;
		vmt_unlock(dev);
		return 0;
	case BAR_IOVA:
		WRITE_ONCE(dev->bar_iova, value);
		return 0;
	case BAR_LENGTH:
		return vmt_log_mark(&dev->log, READ_ONCE(dev->bar_iova), value);
	default:
		return 0;
	}
}

ssize_t vmt_region_read(struct vfio_device *vdev, char __user *buf, size_t count, loff_t *ppos)
{
	struct vmt_dev *dev = vmt_dev_of(vdev);
	u64 index = (u64)*ppos >> VMT_REGION_SHIFT;
	u64 offset = *ppos & (BIT_ULL(VMT_REGION_SHIFT) - 1);
	__le64 out;
	u64 value;
	ssize_t ret;

	if (index == VMT_LEGACY_REGION && vmt_num_regions(dev) > VMT_LEGACY_REGION) {
		ret = vmt_legacy_read(dev, buf, count, offset);
	} else {
		if (index || count != sizeof(out) || offset % sizeof(out) || offset >= BAR_BYTES)
			return -EINVAL;
		ret = bar_read(dev, offset, &value);
		if (ret)
			return ret;
		out = cpu_to_le64(value);
		ret = copy_to_user(buf, &out, sizeof(out)) ? -EFAULT : sizeof(out);
	}
	if (ret > 0)
		*ppos += ret;
	return ret;
}

ssize_t vmt_region_write(struct vfio_device *vdev, const char __user *buf, size_t count,
			 loff_t *ppos)
{
	struct vmt_dev *dev = vmt_dev_of(vdev);
	u64 index = (u64)*ppos >> VMT_REGION_SHIFT;
	u64 offset = *ppos & (BIT_ULL(VMT_REGION_SHIFT) - 1);
	__le64 in;
	ssize_t ret;

	if (index == VMT_LEGACY_REGION && vmt_num_regions(dev) > VMT_LEGACY_REGION) {
		ret = vmt_legacy_write(dev, buf, count, offset);
	} else {
		if (index || count != sizeof(in) || offset % sizeof(in) || offset >= BAR_BYTES)
			return -EINVAL;
		if (copy_from_user(&in, buf, sizeof(in)))
			return -EFAULT;
		ret = bar_write(dev, offset, le64_to_cpu(in)) ?: sizeof(in);
	}
	if (ret > 0)
		*ppos += ret;
	return ret;
}

int vmt_region_mmap(struct vfio_device *vdev, struct vm_area_struct *vma)
{
	struct vmt_dev *dev = vmt_dev_of(vdev);

	if (vma->vm_pgoff >> (VMT_REGION_SHIFT - PAGE_SHIFT) != VMT_LEGACY_REGION ||
	    vmt_num_regions(dev) <= VMT_LEGACY_REGION)
		return -EINVAL;
	return vmt_legacy_mmap(dev, vma);
}

int vmt_region_info(struct vfio_device *vdev, struct vfio_region_info *info,
		    struct vfio_info_cap *caps)
{
	struct vmt_dev *dev = vmt_dev_of(vdev);

	if (info->index >= vmt_num_regions(dev))
		return -EINVAL;
	info->offset = (u64)info->index << VMT_REGION_SHIFT;
	info->size = 0;
	info->flags = 0;
	if (info->index && info->index != VMT_LEGACY_REGION)
		return 0;
	info->flags = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
	info->size = BAR_BYTES;
	if (!info->index)
		return 0;
	if (dev->config.region_mmap)
		info->flags |= VFIO_REGION_INFO_FLAG_MMAP;
	info->size = vmt_legacy_region_bytes(dev);
	return vmt_legacy_caps(dev, caps);
}
