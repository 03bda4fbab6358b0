// SPDX-License-Identifier: GPL-2.0
/* The migration states and what leads from one to the other; reset. */

#include <linux/err.h>
#include <linux/file.h>
#include <linux/fs.h>

#include "vfiomig_test.h"

static const char * const state_names[VFIO_DEVICE_STATE_PRE_COPY_P2P + 1] = {
	[VFIO_DEVICE_STATE_ERROR] = "ERROR",
	[VFIO_DEVICE_STATE_STOP] = "STOP",
	[VFIO_DEVICE_STATE_RUNNING] = "RUNNING",
	[VFIO_DEVICE_STATE_STOP_COPY] = "STOP_COPY",
	[VFIO_DEVICE_STATE_RESUMING] = "RESUMING",
	[VFIO_DEVICE_STATE_RUNNING_P2P] = "RUNNING_P2P",
	[VFIO_DEVICE_STATE_PRE_COPY] = "PRE_COPY",
	[VFIO_DEVICE_STATE_PRE_COPY_P2P] = "PRE_COPY_P2P",
};

const char *vmt_state_name(enum vfio_device_mig_state state)
{
	return state_names[state];
}

static bool is_precopy(enum vfio_device_mig_state state)
{
	return state == VFIO_DEVICE_STATE_PRE_COPY || state == VFIO_DEVICE_STATE_PRE_COPY_P2P;
}

/* Under state_mutex: as after power-on. */
void vmt_renew(struct vmt_dev *dev)
{
	vmt_state_get(dev->fresh);
	vmt_state_put(dev->held.state);
	dev->held.state = dev->fresh;
	dev->held.scratch = 0;
	vmt_view_set(&dev->held, 0);
	dev->loaded = false;
	dev->bar_iova = 0;
	WRITE_ONCE(dev->state, VFIO_DEVICE_STATE_RUNNING);
}

/* Releases state_mutex; before that it does the reset that came meanwhile. */
void vmt_unlock(struct vmt_dev *dev)
{
	mutex_lock(&dev->reset_mutex);
	while (dev->deferred_reset) {
		dev->deferred_reset = false;
		mutex_unlock(&dev->reset_mutex);
		vmt_session_end(dev, VMT_END_RESET);
		vmt_renew(dev);
		mutex_lock(&dev->reset_mutex);
	}
	mutex_unlock(&dev->state_mutex);
	mutex_unlock(&dev->reset_mutex);
}

/* Does not wait: who has state_mutex resets the device when done. */
void vmt_reset(struct vmt_dev *dev)
{
	mutex_lock(&dev->reset_mutex);
	dev->deferred_reset = true;
	if (!mutex_trylock(&dev->state_mutex)) {
		mutex_unlock(&dev->reset_mutex);
		return;
	}
	mutex_unlock(&dev->reset_mutex);
	vmt_unlock(dev);
}

/* VFIO_DEVICE_RESET */
int vmt_reset_asked(struct vmt_dev *dev)
{
	int err = vmt_fault(dev, VMT_AT_RESET, 0, false);

	if (err)
		return err;
	if (!vmt_deviates(dev, VMT_RESET_NO_RUN))
		vmt_reset(dev);
	return 0;
}

/* Under state_mutex. */
void vmt_enter_error(struct vmt_dev *dev)
{
	WRITE_ONCE(dev->state, VFIO_DEVICE_STATE_ERROR);
	vmt_session_end(dev, VMT_END_LEFT);
}

/* What the device holds at this moment, with a reference to its state. EINTR: killed. */
int vmt_view_now(struct vmt_dev *dev, struct vmt_view *view)
{
	if (mutex_lock_killable(&dev->state_mutex))
		return -EINTR;
	if (dev->session && !dev->session->loading && is_precopy(dev->state))
		vmt_view_set(&dev->held, vmt_save_writes(dev->session));
	*view = dev->held;
	vmt_state_get(view->state);
	vmt_unlock(dev);
	return 0;
}

static int begin_save(struct vmt_dev *dev, bool final, struct file **file)
{
	struct vmt_session *session = vmt_session_new(dev, false);

	if (IS_ERR(session))
		return PTR_ERR(session);
	if (final) {
		/* Nothing has changed since it began: the plain state is all. */
		session->save.live = false;
		vmt_save_finalise(session);
	}
	if (dev->legacy_type || (final && vmt_deviates(dev, VMT_NO_FD)))
		return 0;
	*file = vmt_session_file(session);
	if (!IS_ERR(*file))
		return 0;
	vmt_session_end(dev, VMT_END_CLOSED);
	return PTR_ERR(*file);
}

static int begin_load(struct vmt_dev *dev, struct file **file)
{
	struct vmt_session *session = vmt_session_new(dev, true);

	if (IS_ERR(session))
		return PTR_ERR(session);
	if (dev->legacy_type)
		return 0;
	*file = vmt_session_file(session);
	if (!IS_ERR(*file))
		return 0;
	vmt_session_end(dev, VMT_END_CLOSED);
	return PTR_ERR(*file);
}

static int stop_precopy(struct vmt_dev *dev, struct file **file)
{
	/* Its fds died with the last close of the device. */
	if (!dev->session)
		return -ENODEV;
	vmt_save_finalise(dev->session);
	if (!dev->legacy_type && vmt_deviates(dev, VMT_PRECOPY_FD))
		*file = vmt_session_file(dev->session);
	return PTR_ERR_OR_ZERO(*file);
}

static int commit_load(struct vmt_dev *dev)
{
	int err = dev->session ? vmt_load_commit(dev->session) : -ENODEV;

	if (!err)
		vmt_session_end(dev, VMT_END_LEFT);
	return err;
}

static int leave_save(struct vmt_dev *dev)
{
	if (dev->session && is_precopy(dev->state))
		vmt_view_set(&dev->held, vmt_save_writes(dev->session));
	vmt_session_end(dev, VMT_END_LEFT);
	return 0;
}

static int do_arc(struct vmt_dev *dev, enum vfio_device_mig_state next, struct file **file)
{
	switch (next) {
	case VFIO_DEVICE_STATE_STOP_COPY:
		return is_precopy(dev->state) ? stop_precopy(dev, file) :
						begin_save(dev, true, file);
	case VFIO_DEVICE_STATE_PRE_COPY:
	case VFIO_DEVICE_STATE_PRE_COPY_P2P:
		if (is_precopy(dev->state))
			return 0;
		return begin_save(dev, false, file);
	case VFIO_DEVICE_STATE_RESUMING:
		return begin_load(dev, file);
	default:
		if (dev->state == VFIO_DEVICE_STATE_RESUMING)
			return commit_load(dev);
		return leave_save(dev);
	}
}

/*
 * One arc, under state_mutex; next must be a state to which the present one has an arc. On
 * failure the device is where it was, or (fault "entered") in next; *file is NULL then.
 */
int vmt_step(struct vmt_dev *dev, enum vfio_device_mig_state next, struct file **file)
{
	int err;

	*file = NULL;
	err = vmt_fault(dev, VMT_AT_ARC, dev->arcs + 1, true) ?:
	      vmt_fault(dev, VMT_AT_ENTER, next, true) ?:
	      do_arc(dev, next, file);
	if (err) {
		*file = NULL;
		return err;
	}
	WRITE_ONCE(dev->state, next);
	dev->arcs++;
	err = vmt_fault(dev, VMT_AT_ENTERED, next, true);
	if (err && *file) {
		fput(*file);
		*file = NULL;
	}
	return err;
}

/* The deviations from the table. 1: nothing of the kind. */
static int deviant_step(struct vmt_dev *dev, enum vfio_device_mig_state new_state,
			struct file **file)
{
	if (new_state == VFIO_DEVICE_STATE_ERROR && vmt_deviates(dev, VMT_ERROR_SETTABLE)) {
		vmt_enter_error(dev);
		return 0;
	}
	if (dev->state != VFIO_DEVICE_STATE_STOP_COPY)
		return 1;
	if (new_state == VFIO_DEVICE_STATE_STOP_COPY && vmt_deviates(dev, VMT_SECOND_FD))
		return begin_save(dev, true, file);
	if (is_precopy(new_state) && vmt_deviates(dev, VMT_ILLEGAL_ACCEPTED)) {
		if (dev->session)
			vmt_save_resume(dev->session);
		WRITE_ONCE(dev->state, new_state);
		dev->arcs++;
		return 0;
	}
	return 1;
}

static int go(struct vfio_device *vdev, enum vfio_device_mig_state new_state, struct file **file)
{
	struct vmt_dev *dev = vmt_dev_of(vdev);
	enum vfio_device_mig_state next;
	int err;

	err = deviant_step(dev, new_state, file);
	if (err <= 0)
		return err;
	while (dev->state != new_state) {
		/* The table takes no question about ERROR; only reset leaves it. */
		if (dev->state == VFIO_DEVICE_STATE_ERROR)
			return -EIO;
		err = vfio_mig_get_next_state(vdev, dev->state, new_state, &next) ?:
		      vmt_step(dev, next, file);
		if (err)
			return err;
		if (WARN_ON_ONCE(*file && next != new_state)) {
			fput(*file);
			*file = NULL;
			return -EINVAL;
		}
	}
	return 0;
}

static struct file *set_state(struct vfio_device *vdev, enum vfio_device_mig_state new_state)
{
	struct vmt_dev *dev = vmt_dev_of(vdev);
	struct file *file = NULL;
	int err;

	if (mutex_lock_killable(&dev->state_mutex))
		return ERR_PTR(-EINTR);
	err = go(vdev, new_state, &file);
	vmt_unlock(dev);
	return err ? ERR_PTR(err) : file;
}

static int get_state(struct vfio_device *vdev, enum vfio_device_mig_state *state)
{
	struct vmt_dev *dev = vmt_dev_of(vdev);
	int err = vmt_fault(dev, VMT_AT_GET, 0, false);

	if (err)
		return err;
	if (mutex_lock_killable(&dev->state_mutex))
		return -EINTR;
	*state = dev->state;
	vmt_unlock(dev);
	return 0;
}

static int get_data_size(struct vfio_device *vdev, unsigned long *stop_copy_length)
{
	struct vmt_dev *dev = vmt_dev_of(vdev);
	int err = vmt_fault(dev, VMT_AT_SIZE, 0, false);

	if (err)
		return err;
	if (mutex_lock_killable(&dev->state_mutex))
		return -EINTR;
	*stop_copy_length = dev->config.reported_bytes;
	if (dev->config.reported_bytes == VMT_TRUTH)
		*stop_copy_length = dev->held.state->bytes;
	vmt_unlock(dev);
	return 0;
}

const struct vfio_migration_ops vmt_migration_ops = {
	.migration_set_state = set_state,
	.migration_get_state = get_state,
	.migration_get_data_size = get_data_size,
};

/* Since 7.1 the core knows PRECOPY_INFO_V2; before, this does what the core then does. */
int vmt_device_feature(struct vfio_device *vdev, u32 flags, void __user *arg, size_t argsz)
{
	struct vmt_dev *dev = vmt_dev_of(vdev);
	int ret;

	if ((flags & VFIO_DEVICE_FEATURE_MASK) != VMT_FEATURE_PRECOPY_INFO_V2)
		return -ENOTTY;
	if (!(vdev->migration_flags & VFIO_MIGRATION_PRE_COPY))
		return -EINVAL;
	ret = vfio_check_feature(flags, argsz, VFIO_DEVICE_FEATURE_SET, 0);
	if (ret == 1) {
		WRITE_ONCE(dev->precopy_info_v2, true);
		ret = 0;
	}
	return ret;
}
