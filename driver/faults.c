// SPDX-License-Identifier: GPL-2.0
/* Faults that were asked for, and deviations from the rules. */

#include <linux/errno.h>
#include <linux/jiffies.h>
#include <linux/kernel.h>
#include <linux/kstrtox.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/sysfs.h>

#include "vfiomig_test.h"

static const char * const where_names[VMT_AT_COUNT] = {
	[VMT_AT_READ] = "read",
	[VMT_AT_WRITE] = "write",
	[VMT_AT_ARC] = "arc",
	[VMT_AT_ENTER] = "enter",
	[VMT_AT_ENTERED] = "entered",
	[VMT_AT_GET] = "get",
	[VMT_AT_SIZE] = "size",
	[VMT_AT_INFO] = "info",
	[VMT_AT_RESET] = "reset",
	[VMT_AT_LOG_START] = "log_start",
	[VMT_AT_LOG_REPORT] = "log_report",
	[VMT_AT_LOG_STOP] = "log_stop",
};

static const char * const action_names[VMT_ACTION_COUNT] = {
	[VMT_ERRNO] = "errno",
	[VMT_ERROR] = "error",
	[VMT_RESET] = "reset",
	[VMT_HANG] = "hang",
};

static const char * const deviation_names[VMT_DEVIATION_COUNT] = {
	[VMT_NO_FD] = "no-fd",
	[VMT_SECOND_FD] = "second-fd",
	[VMT_PRECOPY_FD] = "precopy-fd",
	[VMT_ILLEGAL_ACCEPTED] = "illegal-accepted",
	[VMT_ERROR_SETTABLE] = "error-settable",
	[VMT_RESTLESS] = "restless",
	[VMT_FORGETFUL] = "forgetful",
	[VMT_EOF_AGAIN] = "eof-again",
	[VMT_EARLY_EOF] = "early-eof",
	[VMT_INFO_ANYWHERE] = "info-anywhere",
	[VMT_REINIT_UNASKED] = "reinit-unasked",
	[VMT_UNDEAD_FD] = "undead-fd",
	[VMT_RESET_NO_RUN] = "reset-no-run",
	[VMT_RESET_KEEPS_FD] = "reset-keeps-fd",
	[VMT_SEEKABLE] = "seekable",
	[VMT_OVERWRITE] = "overwrite",
	[VMT_LOST_WRITE] = "lost-write",
	[VMT_WRITE_AFTER_ERROR] = "write-after-error",
	[VMT_STICKY_LOG] = "sticky-log",
	[VMT_LOG_TWICE] = "log-twice",
	[VMT_LOG_OVERLAP] = "log-overlap",
};

static void remove_fault(struct vmt_dev *dev, int index)
{
	dev->nr_faults--;
	memmove(&dev->faults[index], &dev->faults[index + 1],
		(dev->nr_faults - index) * sizeof(dev->faults[0]));
}

/* The first fault for this place, if any, used up once. */
bool vmt_fault_take(struct vmt_dev *dev, enum vmt_where where, u64 arg, struct vmt_fault *fault)
{
	bool found = false;
	int i;

	if (!READ_ONCE(dev->nr_faults))
		return false;
	spin_lock(&dev->fault_lock);
	for (i = 0; i < dev->nr_faults; i++) {
		if (dev->faults[i].where != where || dev->faults[i].arg != arg)
			continue;
		found = true;
		*fault = dev->faults[i];
		if (fault->count && !--dev->faults[i].count)
			remove_fault(dev, i);
		break;
	}
	spin_unlock(&dev->fault_lock);
	return found;
}

/* How many bytes may be moved from arg on before a fault is met; one at arg itself is past. */
u64 vmt_fault_distance(struct vmt_dev *dev, enum vmt_where where, u64 arg)
{
	u64 distance = U64_MAX;
	int i;

	if (!READ_ONCE(dev->nr_faults))
		return distance;
	spin_lock(&dev->fault_lock);
	for (i = 0; i < dev->nr_faults; i++)
		if (dev->faults[i].where == where && dev->faults[i].arg > arg)
			distance = min(distance, dev->faults[i].arg - arg);
	spin_unlock(&dev->fault_lock);
	return distance;
}

static int hang(struct vmt_session *session, u32 ms)
{
	unsigned long timeout = msecs_to_jiffies(ms) + 1;
	long left;

	if (session) {
		left = wait_event_killable_timeout(session->wait, READ_ONCE(session->dead),
						   timeout);
		return left < 0 ? -EINTR : 0;
	}
	left = schedule_timeout_killable(timeout);
	return left ? -EINTR : 0;
}

static int become_error(struct vmt_dev *dev, struct vmt_session *session, bool locked)
{
	if (locked) {
		vmt_enter_error(dev);
		return 0;
	}
	if (mutex_lock_killable(&dev->state_mutex))
		return -EINTR;
	if (!session || dev->session == session)
		vmt_enter_error(dev);
	vmt_unlock(dev);
	return 0;
}

static void reset_beneath(struct vmt_dev *dev, struct vmt_session *session, bool locked)
{
	if (session && READ_ONCE(session->detached))
		return;
	if (!locked) {
		vmt_reset(dev);
		return;
	}
	mutex_lock(&dev->reset_mutex);
	dev->deferred_reset = true;
	mutex_unlock(&dev->reset_mutex);
}

/*
 * 0: go on. No session lock may be held. locked: the caller has state_mutex. session, if the
 * fault struck one: whose end stops a hang, and which must be the device's to harm the device.
 */
int vmt_fault_act(struct vmt_dev *dev, struct vmt_session *session,
		  const struct vmt_fault *fault, bool locked)
{
	switch (fault->action) {
	case VMT_ERRNO:
		return -(int)fault->value;
	case VMT_ERROR:
		return become_error(dev, session, locked) ?: -(int)fault->value;
	case VMT_RESET:
		reset_beneath(dev, session, locked);
		return 0;
	case VMT_HANG:
		return hang(session, fault->value);
	default:
		return 0;
	}
}

int vmt_fault(struct vmt_dev *dev, enum vmt_where where, u64 arg, bool locked)
{
	struct vmt_fault fault;

	if (!vmt_fault_take(dev, where, arg, &fault))
		return 0;
	return vmt_fault_act(dev, NULL, &fault, locked);
}

ssize_t vmt_faults_show(struct vmt_dev *dev, char *buf)
{
	ssize_t len = 0;
	int i;

	spin_lock(&dev->fault_lock);
	for (i = 0; i < dev->nr_faults; i++) {
		struct vmt_fault *fault = &dev->faults[i];

		len += sysfs_emit_at(buf, len, "%s %llu %s %u", where_names[fault->where],
				     fault->arg, action_names[fault->action], fault->value);
		if (fault->count)
			len += sysfs_emit_at(buf, len, " %u", fault->count);
		len += sysfs_emit_at(buf, len, "\n");
	}
	spin_unlock(&dev->fault_lock);
	return len;
}

static int parse_fault(char *text, struct vmt_fault *fault)
{
	char *word[6];
	int n = 0, found;

	while ((word[n] = strsep(&text, " \t"))) {
		if (!*word[n])
			continue;
		if (++n == ARRAY_SIZE(word))
			return -EINVAL;
	}
	if (n < 4)
		return -EINVAL;
	memset(fault, 0, sizeof(*fault));
	found = match_string(where_names, VMT_AT_COUNT, word[0]);
	if (found < 0)
		return -EINVAL;
	fault->where = found;
	found = match_string(action_names, VMT_ACTION_COUNT, word[2]);
	if (found < 0)
		return -EINVAL;
	fault->action = found;
	if (kstrtoull(word[1], 0, &fault->arg) || kstrtou32(word[3], 0, &fault->value))
		return -EINVAL;
	if (n == 5 && (kstrtou32(word[4], 0, &fault->count) || !fault->count))
		return -EINVAL;
	if (fault->action == VMT_HANG && fault->value > VMT_HANG_MOST_MS)
		return -EINVAL;
	if ((fault->action == VMT_ERRNO || fault->action == VMT_ERROR) &&
	    (!fault->value || fault->value >= MAX_ERRNO))
		return -EINVAL;
	return 0;
}

static int add_fault(struct vmt_dev *dev, const struct vmt_fault *fault)
{
	int err = 0;

	spin_lock(&dev->fault_lock);
	if (dev->nr_faults < VMT_FAULTS_MOST)
		dev->faults[dev->nr_faults++] = *fault;
	else
		err = -ENOSPC;
	spin_unlock(&dev->fault_lock);
	return err;
}

static void clear_faults(struct vmt_dev *dev)
{
	spin_lock(&dev->fault_lock);
	dev->nr_faults = 0;
	spin_unlock(&dev->fault_lock);
}

/* One a line: "WHERE ARG ACTION VALUE [COUNT]" or "clear". The first bad line ends it. */
int vmt_faults_store(struct vmt_dev *dev, const char *buf)
{
	char *text = kstrdup(buf, GFP_KERNEL);
	struct vmt_fault fault;
	char *rest = text, *line;
	int err = 0;

	if (!text)
		return -ENOMEM;
	while (!err && (line = strsep(&rest, "\n"))) {
		line = strim(line);
		if (!*line)
			continue;
		if (!strcmp(line, "clear")) {
			clear_faults(dev);
			continue;
		}
		err = parse_fault(line, &fault);
		if (!err)
			err = add_fault(dev, &fault);
	}
	kfree(text);
	return err;
}

ssize_t vmt_deviations_show(struct vmt_dev *dev, char *buf)
{
	unsigned long active = READ_ONCE(dev->deviations);
	ssize_t len = 0;
	int i;

	for (i = 0; i < VMT_DEVIATION_COUNT; i++)
		if (active & BIT(i))
			len += sysfs_emit_at(buf, len, "%s%s", len ? " " : "",
					     deviation_names[i]);
	return len + sysfs_emit_at(buf, len, "\n");
}

int vmt_deviations_store(struct vmt_dev *dev, const char *buf)
{
	char *text = kstrdup(buf, GFP_KERNEL);
	unsigned long active = 0;
	char *rest = text, *word;
	int found = 0;

	if (!text)
		return -ENOMEM;
	while (found >= 0 && (word = strsep(&rest, " \t\n"))) {
		if (!*word)
			continue;
		found = match_string(deviation_names, VMT_DEVIATION_COUNT, word);
		if (found >= 0)
			active |= BIT(found);
	}
	kfree(text);
	if (found < 0)
		return -EINVAL;
	WRITE_ONCE(dev->deviations, active);
	return 0;
}
