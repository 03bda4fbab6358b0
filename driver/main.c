// SPDX-License-Identifier: GPL-2.0
/* The module: the parent, its two types, a device's life, its ioctls. */

#include <linux/device.h>
#include <linux/init.h>
#include <linux/kernel.h>
#include <linux/mdev.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "vfiomig_test.h"

static struct mdev_type type_v2 = {
	.sysfs_name = "v2",
	.pretty_name = "Test device with migration v2",
};

static struct mdev_type type_v1 = {
	.sysfs_name = "v1",
	.pretty_name = "Test device with the legacy migration region",
};

static struct mdev_type *types[] = { &type_v2, &type_v1 };

static struct class *parent_class;
static struct device *parent_device;
static struct mdev_parent parent;

void vmt_dev_release(struct kref *ref)
{
	struct vmt_dev *dev = container_of(ref, struct vmt_dev, ref);

	vmt_state_put(dev->held.state);
	vmt_state_put(dev->fresh);
	mutex_destroy(&dev->legacy.lock);
	mutex_destroy(&dev->log.lock);
	mutex_destroy(&dev->reset_mutex);
	mutex_destroy(&dev->state_mutex);
	kfree(dev);
}

static struct vmt_dev *vmt_dev_new(bool legacy_type)
{
	struct vmt_dev *dev = kzalloc(sizeof(*dev), GFP_KERNEL);

	if (!dev)
		return NULL;
	dev->config = vmt_default_config;
	dev->fresh = vmt_state_new(&dev->config);
	if (!dev->fresh) {
		kfree(dev);
		return NULL;
	}
	kref_init(&dev->ref);
	mutex_init(&dev->state_mutex);
	mutex_init(&dev->reset_mutex);
	spin_lock_init(&dev->fault_lock);
	vmt_log_init(&dev->log);
	mutex_init(&dev->legacy.lock);
	dev->legacy_type = legacy_type;
	vmt_renew(dev);
	return dev;
}

static int init_device(struct vfio_device *vdev)
{
	struct vmt_vfio *vfio = container_of(vdev, struct vmt_vfio, vdev);
	/* The core would do this when it registers the device, but not look whether it fails. */
	int err = vfio_assign_device_set(vdev, vdev);

	if (err)
		return err;
	vfio->dev = vmt_dev_new(to_mdev_device(vdev->dev)->type == &type_v1);
	if (!vfio->dev)
		return -ENOMEM;
	vdev->log_ops = &vmt_log_ops;
	if (!vfio->dev->legacy_type) {
		vdev->migration_flags = vfio->dev->config.capabilities;
		vdev->mig_ops = &vmt_migration_ops;
	}
	return 0;
}

static void release_device(struct vfio_device *vdev)
{
	kref_put(&vmt_dev_of(vdev)->ref, vmt_dev_release);
}

static int open_device(struct vfio_device *vdev)
{
	struct vmt_dev *dev = vmt_dev_of(vdev);
	int err;

	mutex_lock(&dev->state_mutex);
	err = vmt_legacy_open(dev);
	if (!err) {
		if (!dev->config.keeps_state)
			vmt_renew(dev);
		dev->vdev = vdev;
		dev->opened = true;
		dev->precopy_info_v2 = false;
		dev->arcs = 0;
		dev->opens++;
	}
	vmt_unlock(dev);
	return err;
}

static void close_device(struct vfio_device *vdev)
{
	struct vmt_dev *dev = vmt_dev_of(vdev);

	mutex_lock(&dev->state_mutex);
	vmt_session_end(dev, VMT_END_CLOSED);
	vmt_log_stop(&dev->log);
	if (!dev->config.keeps_state)
		vmt_renew(dev);
	dev->opened = false;
	vmt_unlock(dev);
	dev->vdev = NULL;
	vmt_legacy_close(dev);
}

static void request_device(struct vfio_device *vdev, unsigned int count)
{
	if (!count)
		dev_info(vdev->dev, "removal waits until the device is closed\n");
}

static long get_info(struct vmt_dev *dev, struct vfio_device_info __user *arg)
{
	size_t minsz = offsetofend(struct vfio_device_info, num_irqs);
	struct vfio_device_info info;

	if (copy_from_user(&info, arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz)
		return -EINVAL;
	info.flags = dev->config.reset_flag ? VFIO_DEVICE_FLAGS_RESET : 0;
	info.num_regions = vmt_num_regions(dev);
	info.num_irqs = VMT_NUM_IRQS;
	return copy_to_user(arg, &info, minsz) ? -EFAULT : 0;
}

static long get_irq_info(struct vfio_irq_info __user *arg)
{
	size_t minsz = offsetofend(struct vfio_irq_info, count);
	struct vfio_irq_info info;

	if (copy_from_user(&info, arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz || info.index >= VMT_NUM_IRQS)
		return -EINVAL;
	info.flags = 0;
	info.count = 0;
	return copy_to_user(arg, &info, minsz) ? -EFAULT : 0;
}

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 19, 0)
/* The core does this since 6.19. */
static long copy_caps(struct vfio_region_info *info, struct vfio_info_cap *caps,
		      struct vfio_region_info __user *arg)
{
	if (!caps->size)
		return 0;
	info->flags |= VFIO_REGION_INFO_FLAG_CAPS;
	if (info->argsz < sizeof(*info) + caps->size) {
		info->argsz = sizeof(*info) + caps->size;
		info->cap_offset = 0;
		return 0;
	}
	vfio_info_cap_shift(caps, sizeof(*info));
	info->cap_offset = sizeof(*info);
	return copy_to_user((void __user *)arg + sizeof(*info), caps->buf, caps->size) ?
		-EFAULT : 0;
}

static long get_region_info(struct vfio_device *vdev, struct vfio_region_info __user *arg)
{
	size_t minsz = offsetofend(struct vfio_region_info, offset);
	struct vfio_info_cap caps = {};
	struct vfio_region_info info;
	long err;

	if (copy_from_user(&info, arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz)
		return -EINVAL;
	info.cap_offset = 0;
	err = vmt_region_info(vdev, &info, &caps);
	if (!err)
		err = copy_caps(&info, &caps, arg);
	kfree(caps.buf);
	if (!err && copy_to_user(arg, &info, minsz))
		err = -EFAULT;
	return err;
}
#endif

static long device_ioctl(struct vfio_device *vdev, unsigned int cmd, unsigned long arg)
{
	void __user *uptr = (void __user *)arg;

	switch (cmd) {
	case VFIO_DEVICE_GET_INFO:
		return get_info(vmt_dev_of(vdev), uptr);
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 19, 0)
	case VFIO_DEVICE_GET_REGION_INFO:
		return get_region_info(vdev, uptr);
#endif
	case VFIO_DEVICE_GET_IRQ_INFO:
		return get_irq_info(uptr);
	case VFIO_DEVICE_SET_IRQS:
		return -EINVAL;
	case VFIO_DEVICE_RESET:
		return vmt_reset_asked(vmt_dev_of(vdev));
	default:
		return -ENOTTY;
	}
}

static const struct vfio_device_ops device_ops = {
	.name = VMT_NAME,
	.init = init_device,
	.release = release_device,
	.open_device = open_device,
	.close_device = close_device,
	.request = request_device,
	.ioctl = device_ioctl,
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 19, 0)
	.get_region_info_caps = vmt_region_info,
#endif
	.read = vmt_region_read,
	.write = vmt_region_write,
	.mmap = vmt_region_mmap,
	.device_feature = vmt_device_feature,
	.bind_iommufd = vfio_iommufd_emulated_bind,
	.unbind_iommufd = vfio_iommufd_emulated_unbind,
	.attach_ioas = vfio_iommufd_emulated_attach_ioas,
	.detach_ioas = vfio_iommufd_emulated_detach_ioas,
};

static int probe(struct mdev_device *mdev)
{
	struct vmt_vfio *vfio;
	int err;

	vfio = vfio_alloc_device(vmt_vfio, vdev, &mdev->dev, &device_ops);
	if (IS_ERR(vfio))
		return PTR_ERR(vfio);
	dev_set_drvdata(&mdev->dev, vfio);
	err = vfio_register_emulated_iommu_dev(&vfio->vdev);
	if (err)
		vfio_put_device(&vfio->vdev);
	return err;
}

static void remove(struct mdev_device *mdev)
{
	struct vmt_vfio *vfio = dev_get_drvdata(&mdev->dev);

	vfio_unregister_group_dev(&vfio->vdev);
	vfio_put_device(&vfio->vdev);
}

static unsigned int get_available(struct mdev_type *type)
{
	return INT_MAX;
}

static struct mdev_driver driver = {
	.device_api = VMT_NAME,
	.driver = {
		.name = VMT_NAME,
		.owner = THIS_MODULE,
		.mod_name = KBUILD_MODNAME,
		.dev_groups = vmt_groups,
	},
	.probe = probe,
	.remove = remove,
	.get_available = get_available,
};

static int __init vmt_init(void)
{
	int err;

	err = mdev_register_driver(&driver);
	if (err)
		return err;
	parent_class = class_create(VMT_NAME);
	if (IS_ERR(parent_class)) {
		err = PTR_ERR(parent_class);
		goto out_driver;
	}
	parent_device = device_create(parent_class, NULL, MKDEV(0, 0), NULL, VMT_NAME);
	if (IS_ERR(parent_device)) {
		err = PTR_ERR(parent_device);
		goto out_class;
	}
	err = mdev_register_parent(&parent, parent_device, &driver, types, ARRAY_SIZE(types));
	if (err)
		goto out_device;
	return 0;

out_device:
	device_unregister(parent_device);
out_class:
	class_destroy(parent_class);
out_driver:
	mdev_unregister_driver(&driver);
	return err;
}

static void __exit vmt_exit(void)
{
	mdev_unregister_parent(&parent);
	device_unregister(parent_device);
	class_destroy(parent_class);
	mdev_unregister_driver(&driver);
}

module_init(vmt_init);
module_exit(vmt_exit);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("VFIO device without hardware, to test migration");
MODULE_AUTHOR("The vfiomig contributors");
