// SPDX-License-Identifier: GPL-2.0
/* Data sessions: their life, their files, when they transfer. */

#include <linux/anon_inodes.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/math64.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>

#include "vfiomig_test.h"

static void session_release(struct kref *ref)
{
	struct vmt_session *session = container_of(ref, struct vmt_session, ref);

	cancel_delayed_work_sync(&session->wake);
	if (session->loading) {
		vmt_state_put(session->load.view.state);
		kfree(session->load.expected);
	} else {
		vmt_state_put(session->save.view.state);
	}
	kfree(session->buf);
	mutex_destroy(&session->lock);
	kref_put(&session->dev->ref, vmt_dev_release);
	kfree(session);
}

void vmt_session_get(struct vmt_session *session)
{
	kref_get(&session->ref);
}

void vmt_session_put(struct vmt_session *session)
{
	kref_put(&session->ref, session_release);
}

static void wake_pollers(struct work_struct *work)
{
	struct vmt_session *session =
		container_of(to_delayed_work(work), struct vmt_session, wake);

	wake_up_all(&session->wait);
}

/* Under state_mutex. Becomes the device's session; an earlier one is ended. */
struct vmt_session *vmt_session_new(struct vmt_dev *dev, bool loading)
{
	struct vmt_session *session = kzalloc(sizeof(*session), GFP_KERNEL_ACCOUNT);
	int err = -ENOMEM;

	if (!session)
		return ERR_PTR(-ENOMEM);
	kref_init(&session->ref);
	mutex_init(&session->lock);
	init_waitqueue_head(&session->wait);
	INIT_DELAYED_WORK(&session->wake, wake_pollers);
	kref_get(&dev->ref);
	session->dev = dev;
	session->serial = ++dev->sessions;
	session->config = dev->config;
	session->loading = loading;
	session->buf = kzalloc(VMT_RECORD_BYTES, GFP_KERNEL_ACCOUNT);
	if (session->buf)
		err = loading ? vmt_load_init(session) : vmt_save_init(session);
	if (err) {
		vmt_session_put(session);
		return ERR_PTR(err);
	}
	vmt_session_end(dev, VMT_END_LEFT);
	dev->session = session;
	return session;
}

/* Under state_mutex. The device forgets its session, whose files then answer ENODEV. */
void vmt_session_end(struct vmt_dev *dev, enum vmt_end how)
{
	struct vmt_session *session = dev->session;
	bool survives = vmt_deviates(dev, how == VMT_END_RESET ? VMT_RESET_KEEPS_FD :
							   VMT_UNDEAD_FD);

	if (!session)
		return;
	dev->session = NULL;
	mutex_lock(&session->lock);
	WRITE_ONCE(session->detached, true);
	if (!survives)
		WRITE_ONCE(session->dead, true);
	mutex_unlock(&session->lock);
	wake_up_all(&session->wait);
	vmt_session_put(session);
}

/* Whether data may flow; else when, asked from now on. Under session->lock. */
static bool is_ready(struct vmt_session *session, u64 now)
{
	u64 latency = session->loading ? 0 : session->config.latency_us * NSEC_PER_USEC;

	if (latency && !session->asked) {
		session->asked = true;
		session->ready_at = max(session->ready_at, now) + latency;
	}
	return now >= session->ready_at;
}

/* 0: with session->lock held, data may be moved. */
int vmt_session_begin_transfer(struct vmt_session *session, bool nonblock)
{
	int err;
	u64 now;

	for (;;) {
		if (mutex_lock_killable(&session->lock))
			return -EINTR;
		if (session->dead) {
			mutex_unlock(&session->lock);
			return -ENODEV;
		}
		now = ktime_get_ns();
		if (is_ready(session, now))
			return 0;
		now = session->ready_at - now;
		mutex_unlock(&session->lock);
		if (nonblock && session->config.nonblock)
			return -EAGAIN;
		err = wait_event_interruptible_hrtimeout(session->wait,
							 READ_ONCE(session->dead),
							 ns_to_ktime(now));
		if (err == -ERESTARTSYS)
			return err;
	}
}

/* Under session->lock: so many bytes were moved, the next may follow when bytes_per_s allows. */
void vmt_session_moved(struct vmt_session *session, size_t bytes)
{
	u64 rate = session->config.bytes_per_s;

	session->asked = false;
	if (rate && bytes)
		session->ready_at = ktime_get_ns() +
			mul_u64_u64_div_u64(bytes, NSEC_PER_SEC, rate);
}

/* How much of count one transfer may move: with bytes_per_s, that of 1/16 s. */
size_t vmt_session_pace(const struct vmt_session *session, size_t count)
{
	u64 rate = session->config.bytes_per_s;

	return rate ? min_t(u64, count, max(rate / 16, 1ULL)) : count;
}

static ssize_t save_read(struct file *file, char __user *buf, size_t count, loff_t *ppos)
{
	struct iov_iter to;
	int err = import_ubuf(ITER_DEST, buf, count, &to);

	return err ?: vmt_save_read(file->private_data, &to, file->f_flags & O_NONBLOCK);
}

static ssize_t load_write(struct file *file, const char __user *buf, size_t count, loff_t *ppos)
{
	struct iov_iter from;
	int err = import_ubuf(ITER_SOURCE, (char __user *)buf, count, &from);

	return err ?: vmt_load_write(file->private_data, &from, file->f_flags & O_NONBLOCK);
}

static long save_ioctl(struct file *file, unsigned int cmd, unsigned long arg)
{
	if (cmd != VFIO_MIG_GET_PRECOPY_INFO)
		return -ENOTTY;
	return vmt_save_info(file->private_data, (struct vfio_precopy_info __user *)arg);
}

static __poll_t session_poll(struct file *file, poll_table *table)
{
	struct vmt_session *session = file->private_data;
	__poll_t events = session->loading ? EPOLLOUT | EPOLLWRNORM : EPOLLIN | EPOLLRDNORM;
	u64 now;

	poll_wait(file, &session->wait, table);
	mutex_lock(&session->lock);
	now = ktime_get_ns();
	if (session->dead) {
		events |= EPOLLERR | EPOLLHUP;
	} else if (!is_ready(session, now)) {
		events = 0;
		mod_delayed_work(system_wq, &session->wake,
				 nsecs_to_jiffies(session->ready_at - now) + 1);
	} else if (!session->loading && !session->final && !vmt_save_available(session)) {
		events = 0;
		if (session->config.dirty_bytes_per_s)
			mod_delayed_work(system_wq, &session->wake, msecs_to_jiffies(10));
	}
	mutex_unlock(&session->lock);
	return events;
}

static int session_close(struct inode *inode, struct file *file)
{
	vmt_session_put(file->private_data);
	return 0;
}

#define SAVE_FOPS						\
	.owner = THIS_MODULE,					\
	.read = save_read,					\
	.unlocked_ioctl = save_ioctl,				\
	.compat_ioctl = compat_ptr_ioctl,			\
	.release = session_close,				\
	.llseek = noop_llseek	/* stream_open() forbids it */

#define LOAD_FOPS						\
	.owner = THIS_MODULE,					\
	.write = load_write,					\
	.release = session_close,				\
	.llseek = noop_llseek

static const struct file_operations save_fops = { SAVE_FOPS };
static const struct file_operations save_poll_fops = { SAVE_FOPS, .poll = session_poll };
static const struct file_operations load_fops = { LOAD_FOPS };
static const struct file_operations load_poll_fops = { LOAD_FOPS, .poll = session_poll };

/* A new file of the session, of which it holds a reference. */
struct file *vmt_session_file(struct vmt_session *session)
{
	const struct file_operations *fops;
	struct file *file;

	if (session->loading)
		fops = session->config.poll ? &load_poll_fops : &load_fops;
	else
		fops = session->config.poll ? &save_poll_fops : &save_fops;
	vmt_session_get(session);
	file = anon_inode_getfile(VMT_NAME, fops, session,
				  session->loading ? O_WRONLY : O_RDONLY);
	if (IS_ERR(file))
		vmt_session_put(session);
	else if (!vmt_deviates(session->dev, VMT_SEEKABLE))
		stream_open(file_inode(file), file);
	return file;
}
