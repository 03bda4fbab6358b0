// SPDX-License-Identifier: GPL-2.0
/* The files in /sys/bus/mdev/devices/UUID/test/. */

#include <linux/debugfs.h>
#include <linux/device.h>
#include <linux/kstrtox.h>
#include <linux/log2.h>
#include <linux/mdev.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/sysfs.h>

#include "vfiomig_test.h"

#define MIB	(1ULL << 20)

const struct vmt_config vmt_default_config = {
	.capabilities = VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_P2P | VFIO_MIGRATION_PRE_COPY,
	.state_bytes = MIB,
	.seed = 1,
	.initial_bytes = VMT_ALL,
	.drained = 1,
	.reported_bytes = VMT_TRUTH,
	.check = VMT_CHECK_COMMIT,
	.keeps_state = 1,
	.reset_flag = 1,
	.log_ranges_most = 16,
	.log_page_min = 4096,
	.log_page_max = 2 * MIB,
	.region_data_bytes = 65536,
};

/* names: words for 0, 1, ...; word: that for `means`, which no number gives. */
struct vmt_setting {
	struct device_attribute attr;
	size_t offset;
	u64 least;
	u64 most;
	const char * const *names;
	const char *word;
	u64 means;
	bool legacy_only;
	bool needs_renewal;
};

static struct vmt_vfio *vfio_of(struct device *dev)
{
	return dev_get_drvdata(dev);
}

static u64 *value_of(struct vmt_dev *dev, const struct vmt_setting *setting)
{
	return (void *)&dev->config + setting->offset;
}

static ssize_t setting_show(struct device *device, struct device_attribute *attr, char *buf)
{
	struct vmt_setting *setting = container_of(attr, struct vmt_setting, attr);
	u64 value = READ_ONCE(*value_of(vfio_of(device)->dev, setting));

	if (setting->names)
		return sysfs_emit(buf, "%s\n", setting->names[value]);
	if (setting->word && value == setting->means)
		return sysfs_emit(buf, "%s\n", setting->word);
	return sysfs_emit(buf, "%llu\n", value);
}

static int parse(const struct vmt_setting *setting, const char *buf, u64 *value)
{
	int i;

	if (setting->names) {
		for (i = 0; i <= setting->most; i++) {
			if (sysfs_streq(buf, setting->names[i])) {
				*value = i;
				return 0;
			}
		}
		return -EINVAL;
	}
	if (setting->word && sysfs_streq(buf, setting->word)) {
		*value = setting->means;
		return 0;
	}
	if (kstrtoull(buf, 0, value) || (setting->word && *value == setting->means))
		return -EINVAL;
	return *value < setting->least || *value > setting->most ? -EINVAL : 0;
}

/* Settings that depend on others. Under state_mutex. */
static bool agrees(const struct vmt_dev *dev, const struct vmt_setting *setting, u64 value)
{
	switch (setting->offset) {
	case offsetof(struct vmt_config, capabilities):
		return !value || value & VFIO_MIGRATION_STOP_COPY;
	case offsetof(struct vmt_config, log_page_min):
		return is_power_of_2(value) && value <= dev->config.log_page_max;
	case offsetof(struct vmt_config, log_page_max):
		return is_power_of_2(value) && value >= dev->config.log_page_min;
	default:
		return true;
	}
}

/*
 * What the core reads of a device that is not open. Without migration, the core's debugfs file
 * must go before mig_ops, which it follows; it does not come back.
 */
static void apply_capabilities(struct vmt_vfio *vfio)
{
	struct vfio_device *vdev = &vfio->vdev;
	struct vmt_dev *dev = vfio->dev;

	if (dev->legacy_type)
		return;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 8, 0) && IS_ENABLED(CONFIG_VFIO_DEBUGFS)
	if (!dev->config.capabilities && !IS_ERR_OR_NULL(vdev->debug_root))
		debugfs_lookup_and_remove("migration", vdev->debug_root);
#endif
	vdev->migration_flags = dev->config.capabilities;
	vdev->mig_ops = dev->config.capabilities ? &vmt_migration_ops : NULL;
	/* It may be left in a state that it no longer has. */
	WRITE_ONCE(dev->state, VFIO_DEVICE_STATE_RUNNING);
}

/* Under state_mutex, the device is not open. */
static int change(struct vmt_vfio *vfio, const struct vmt_setting *setting, u64 value)
{
	struct vmt_dev *dev = vfio->dev;
	u64 *place = value_of(dev, setting);
	u64 old = *place;
	struct vmt_state *fresh;

	if (!agrees(dev, setting, value))
		return -EINVAL;
	WRITE_ONCE(*place, value);
	if (setting->needs_renewal) {
		fresh = vmt_state_new(&dev->config);
		if (!fresh) {
			WRITE_ONCE(*place, old);
			return -ENOMEM;
		}
		vmt_state_put(dev->fresh);
		dev->fresh = fresh;
		vmt_renew(dev);
	}
	if (setting->offset == offsetof(struct vmt_config, capabilities))
		apply_capabilities(vfio);
	return 0;
}

static ssize_t setting_store(struct device *device, struct device_attribute *attr,
			     const char *buf, size_t count)
{
	struct vmt_setting *setting = container_of(attr, struct vmt_setting, attr);
	struct vmt_vfio *vfio = vfio_of(device);
	struct vmt_dev *dev = vfio->dev;
	u64 value;
	int err;

	err = parse(setting, buf, &value);
	if (err)
		return err;
	if (mutex_lock_killable(&dev->state_mutex))
		return -EINTR;
	err = dev->opened ? -EBUSY : change(vfio, setting, value);
	vmt_unlock(dev);
	return err ?: count;
}

static const char * const check_names[] = { "none", "write", "commit" };
static const char * const drained_names[] = { "0", "ENOMSG" };

#define SETTING(_name, _least, _most, ...)					\
static struct vmt_setting setting_##_name = {					\
	.attr = __ATTR(_name, 0644, setting_show, setting_store),		\
	.offset = offsetof(struct vmt_config, _name),				\
	.least = _least,							\
	.most = _most,								\
	__VA_ARGS__								\
}

SETTING(capabilities, 0, 7);
SETTING(state_bytes, 0, VMT_STATE_MOST, .needs_renewal = true);
SETTING(seed, 0, U64_MAX, .needs_renewal = true);
SETTING(zero_percent, 0, 100, .needs_renewal = true);
SETTING(initial_bytes, 0, VMT_STATE_MOST, .word = "all", .means = VMT_ALL);
SETTING(dirty_bytes_per_s, 0, VMT_STATE_MOST);
SETTING(drained, 0, 1, .names = drained_names);
SETTING(reinit_at, 0, U32_MAX);
SETTING(bytes_per_s, 0, VMT_STATE_MOST);
SETTING(latency_us, 0, 60 * USEC_PER_SEC);
SETTING(read_most, 0, VMT_STATE_MOST);
SETTING(write_most, 0, VMT_STATE_MOST);
SETTING(poll, 0, 1);
SETTING(nonblock, 0, 1);
SETTING(reported_bytes, 0, U64_MAX, .word = "true", .means = VMT_TRUTH);
SETTING(check, 0, VMT_CHECK_COMMIT, .names = check_names);
SETTING(keeps_state, 0, 1);
SETTING(reset_flag, 0, 1);
SETTING(log_ranges_most, 1, U32_MAX);
SETTING(log_page_min, 4096, BIT_ULL(40));
SETTING(log_page_max, 4096, BIT_ULL(40));
SETTING(region_data_bytes, 64, 64 * MIB, .legacy_only = true);
SETTING(region_mmap, 0, 1, .legacy_only = true);
SETTING(region_framed, 0, 1, .legacy_only = true);

static ssize_t fault_show(struct device *device, struct device_attribute *attr, char *buf)
{
	return vmt_faults_show(vfio_of(device)->dev, buf);
}

static ssize_t fault_store(struct device *device, struct device_attribute *attr,
			   const char *buf, size_t count)
{
	return vmt_faults_store(vfio_of(device)->dev, buf) ?: count;
}
static DEVICE_ATTR_RW(fault);

static ssize_t deviation_show(struct device *device, struct device_attribute *attr, char *buf)
{
	return vmt_deviations_show(vfio_of(device)->dev, buf);
}

static ssize_t deviation_store(struct device *device, struct device_attribute *attr,
			       const char *buf, size_t count)
{
	return vmt_deviations_store(vfio_of(device)->dev, buf) ?: count;
}
static DEVICE_ATTR_RW(deviation);

static ssize_t dirty_store(struct device *device, struct device_attribute *attr,
			   const char *buf, size_t count)
{
	char *text = kstrdup(buf, GFP_KERNEL), *rest = text, *word;
	u64 iova, length;
	int err = -EINVAL;

	if (!text)
		return -ENOMEM;
	rest = strim(text);
	word = strsep(&rest, " \t");
	if (rest && !kstrtoull(word, 0, &iova) && !kstrtoull(skip_spaces(rest), 0, &length))
		err = vmt_log_mark(&vfio_of(device)->dev->log, iova, length);
	kfree(text);
	return err ?: count;
}
static DEVICE_ATTR_WO(dirty);

static ssize_t digest_show(struct device *device, struct device_attribute *attr, char *buf)
{
	struct vmt_view view;
	u64 digest;
	int err = vmt_view_now(vfio_of(device)->dev, &view);

	if (err)
		return err;
	err = vmt_digest(&view, &digest);
	vmt_state_put(view.state);
	return err ?: sysfs_emit(buf, "%016llx\n", digest);
}
static DEVICE_ATTR_RO(digest);

static ssize_t held_bytes_show(struct device *device, struct device_attribute *attr, char *buf)
{
	struct vmt_view view;
	u64 bytes;
	int err = vmt_view_now(vfio_of(device)->dev, &view);

	if (err)
		return err;
	bytes = view.state->bytes;
	vmt_state_put(view.state);
	return sysfs_emit(buf, "%llu\n", bytes);
}
static DEVICE_ATTR_RO(held_bytes);

static ssize_t opens_show(struct device *device, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%llu\n", READ_ONCE(vfio_of(device)->dev->opens));
}
static DEVICE_ATTR_RO(opens);

static ssize_t arcs_show(struct device *device, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%llu\n", READ_ONCE(vfio_of(device)->dev->arcs));
}
static DEVICE_ATTR_RO(arcs);

static ssize_t state_show(struct device *device, struct device_attribute *attr, char *buf)
{
	return sysfs_emit(buf, "%s\n", vmt_state_name(READ_ONCE(vfio_of(device)->dev->state)));
}
static DEVICE_ATTR_RO(state);

static struct attribute *attrs[] = {
	&setting_capabilities.attr.attr,
	&setting_state_bytes.attr.attr,
	&setting_seed.attr.attr,
	&setting_zero_percent.attr.attr,
	&setting_initial_bytes.attr.attr,
	&setting_dirty_bytes_per_s.attr.attr,
	&setting_drained.attr.attr,
	&setting_reinit_at.attr.attr,
	&setting_bytes_per_s.attr.attr,
	&setting_latency_us.attr.attr,
	&setting_read_most.attr.attr,
	&setting_write_most.attr.attr,
	&setting_poll.attr.attr,
	&setting_nonblock.attr.attr,
	&setting_reported_bytes.attr.attr,
	&setting_check.attr.attr,
	&setting_keeps_state.attr.attr,
	&setting_reset_flag.attr.attr,
	&setting_log_ranges_most.attr.attr,
	&setting_log_page_min.attr.attr,
	&setting_log_page_max.attr.attr,
	&setting_region_data_bytes.attr.attr,
	&setting_region_mmap.attr.attr,
	&setting_region_framed.attr.attr,
	&dev_attr_fault.attr,
	&dev_attr_deviation.attr,
	&dev_attr_dirty.attr,
	&dev_attr_digest.attr,
	&dev_attr_held_bytes.attr,
	&dev_attr_opens.attr,
	&dev_attr_arcs.attr,
	&dev_attr_state.attr,
	NULL
};

static umode_t visible(struct kobject *kobj, struct attribute *attr, int index)
{
	struct device_attribute *device_attr = container_of(attr, struct device_attribute, attr);
	struct vmt_vfio *vfio = vfio_of(kobj_to_dev(kobj));

	if (device_attr->store == setting_store &&
	    container_of(device_attr, struct vmt_setting, attr)->legacy_only &&
	    !vfio->dev->legacy_type)
		return 0;
	return attr->mode;
}

static const struct attribute_group group = {
	.name = "test",
	.attrs = attrs,
	.is_visible = visible,
};

const struct attribute_group *vmt_groups[] = { &group, NULL };
