// SPDX-License-Identifier: GPL-2.0
/*
 * The stream of a saving device: the plain state as it was when the session began, then, after
 * PRE_COPY, a record for each page that was written since, and a closing record with the header.
 */

#include <linux/file.h>
#include <linux/math64.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "vfiomig_test.h"

/* Under state_mutex, as all here that is called by the state machine. */
int vmt_save_init(struct vmt_session *session)
{
	struct vmt_save *save = &session->save;
	struct vmt_dev *dev = session->dev;
	const struct vmt_config *config = &session->config;

	save->view = dev->held;
	vmt_state_get(save->view.state);
	save->writes = save->view.writes;
	save->sent = save->writes;
	save->offered = min(config->initial_bytes, save->view.state->bytes);
	save->clock_ns = ktime_get_ns();
	save->buf_page = VMT_NO_PAGE;
	save->live = config->dirty_bytes_per_s && !save->view.state->headless;
	if (vmt_deviates(dev, VMT_RESTLESS))
		save->noise[0] = dev->saves++;
	if (vmt_deviates(dev, VMT_FORGETFUL))
		save->noise[1] = dev->loaded;
	return 0;
}

static u64 pages_to_send(const struct vmt_save *save)
{
	return min(save->writes - save->sent, vmt_pages(save->view.state));
}

/*
 * The device writes pages at its rate, one after the other and round again, as many as were read
 * of the stream at most. What is overtaken a whole round before it is sent is sent once.
 */
static void advance(struct vmt_session *session)
{
	struct vmt_save *save = &session->save;
	u64 now = ktime_get_ns();
	/* The quotient must fit: x86 divides in hardware. */
	u64 elapsed_ns = min(now - save->clock_ns, 3600 * (u64)NSEC_PER_SEC);
	u64 most, pages;

	if (session->final || !save->live)
		return;
	save->credit += mul_u64_u64_div_u64(elapsed_ns, session->config.dirty_bytes_per_s,
					    NSEC_PER_SEC);
	save->clock_ns = now;
	pages = save->credit >> VMT_PAGE_SHIFT;
	save->credit &= VMT_PAGE - 1;
	most = min(save->pos, save->view.state->bytes) >> VMT_PAGE_SHIFT;
	most -= min(most, save->writes - save->sent);
	save->writes += min(pages, most);
}

u64 vmt_save_writes(struct vmt_session *session)
{
	u64 writes;

	mutex_lock(&session->lock);
	advance(session);
	writes = session->save.writes;
	mutex_unlock(&session->lock);
	return writes;
}

static u64 record_part(const struct vmt_save *save)
{
	u64 rest;

	if (save->pos < save->view.state->bytes)
		return 0;
	div64_u64_rem(save->pos - save->view.state->bytes, VMT_RECORD_BYTES, &rest);
	return rest ? VMT_RECORD_BYTES - rest : 0;
}

static u64 plain_left(const struct vmt_session *session)
{
	const struct vmt_save *save = &session->save;
	u64 end = session->final ? save->view.state->bytes : save->offered;

	return end > save->pos ? end - save->pos : 0;
}

static u64 records_left(const struct vmt_save *save)
{
	return record_part(save) + (pages_to_send(save) + save->closing) * VMT_RECORD_BYTES;
}

/* What can be read now. Under session->lock. */
u64 vmt_save_available(struct vmt_session *session)
{
	struct vmt_save *save = &session->save;

	advance(session);
	if (save->pos + plain_left(session) < save->view.state->bytes)
		return plain_left(session);
	return plain_left(session) + records_left(save);
}

/* The device has stopped. Nothing changes any more, and the rest is to be read. */
void vmt_save_finalise(struct vmt_session *session)
{
	struct vmt_save *save = &session->save;
	struct vmt_dev *dev = session->dev;

	mutex_lock(&session->lock);
	advance(session);
	session->final = true;
	vmt_view_set(&dev->held, save->writes);
	save->closing_scratch = dev->held.scratch;
	save->closing = !save->view.state->headless &&
		(save->live || save->writes != save->view.writes ||
		 save->closing_scratch != save->view.scratch);
	save->gap_at = save->pos + vmt_save_available(session) / 2;
	mutex_unlock(&session->lock);
	wake_up_all(&session->wait);
}

/* Deviation illegal-accepted: from STOP_COPY back to PRE_COPY. */
void vmt_save_resume(struct vmt_session *session)
{
	mutex_lock(&session->lock);
	session->final = false;
	session->save.closing = false;
	session->save.clock_ns = ktime_get_ns();
	mutex_unlock(&session->lock);
}

static void fill_page(struct vmt_session *session, u64 page)
{
	struct vmt_save *save = &session->save;
	struct vmt_state *state = save->view.state;
	struct vmt_header *header = (struct vmt_header *)session->buf;

	vmt_page(state, page, vmt_view_generation(&save->view, page), session->buf);
	if (!page && !state->headless) {
		vmt_header_make(&save->view, header);
		header->live = save->live;
		vmt_header_seal(header);
		memcpy(header->noise, save->noise, sizeof(header->noise));
	} else if (state->headless && page == vmt_pages(state) - 1) {
		session->buf[(state->bytes - 1) & (VMT_PAGE - 1)] ^=
			save->noise[0] ^ save->noise[1];
	}
	save->buf_page = page;
}

static void fill_record(struct vmt_session *session)
{
	struct vmt_save *save = &session->save;
	struct vmt_state *state = save->view.state;
	u8 *payload = session->buf + sizeof(struct vmt_record);
	u64 pages = vmt_pages(state);
	u64 page, lap;

	save->record_at = save->pos;
	save->buf_page = VMT_NO_PAGE;
	if (save->writes != save->sent) {
		save->sent = save->writes - pages_to_send(save);
		lap = div64_u64_rem(save->sent, pages, &page);
		vmt_page(state, page, lap + 1, payload);
		vmt_record_make((struct vmt_record *)session->buf, VMT_RECORD_PAGE, save->sent);
		save->sent++;
	} else {
		struct vmt_view view = save->view;

		vmt_view_set(&view, save->writes);
		view.scratch = save->closing_scratch;
		memset(payload, 0, VMT_PAGE);
		vmt_header_make(&view, (struct vmt_header *)payload);
		vmt_record_make((struct vmt_record *)session->buf, VMT_RECORD_CLOSE,
				save->writes);
		save->closing = false;
	}
}

/* What the buffer has from the present position on; made if it is not there. */
static const u8 *ahead(struct vmt_session *session, size_t *count)
{
	struct vmt_save *save = &session->save;
	size_t offset;

	if (save->pos < save->view.state->bytes) {
		offset = save->pos & (VMT_PAGE - 1);
		if (save->buf_page != save->pos >> VMT_PAGE_SHIFT)
			fill_page(session, save->pos >> VMT_PAGE_SHIFT);
		*count = min_t(u64, VMT_PAGE - offset, save->view.state->bytes - save->pos);
		return session->buf + offset;
	}
	if (!record_part(save))
		fill_record(session);
	offset = save->pos - save->record_at;
	*count = VMT_RECORD_BYTES - offset;
	return session->buf + offset;
}

static ssize_t copy_out(struct vmt_session *session, struct iov_iter *to, size_t count)
{
	size_t done = 0;

	while (done < count) {
		size_t chunk, copied;
		const u8 *from = ahead(session, &chunk);

		chunk = min(chunk, count - done);
		copied = copy_to_iter(from, chunk, to);
		session->save.pos += copied;
		done += copied;
		if (copied < chunk)
			return done ?: -EFAULT;
		if (fatal_signal_pending(current))
			break;
		cond_resched();
	}
	return done;
}

static ssize_t at_end(struct vmt_session *session, struct iov_iter *to)
{
	struct vmt_save *save = &session->save;
	static const u8 surplus[8] = { 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee };

	if (!session->final)
		return session->config.drained ? -ENOMSG : 0;
	if (save->ends == 1 && vmt_deviates(session->dev, VMT_EOF_AGAIN)) {
		save->ends = 2;
		return copy_to_iter(surplus, min(iov_iter_count(to), sizeof(surplus)), to);
	}
	if (!save->ends)
		save->ends = 1;
	return 0;
}

/* Deviation early-eof: nothing beyond the middle until a read gave 0 there. */
static bool in_gap(struct vmt_session *session, size_t *count)
{
	struct vmt_save *save = &session->save;

	if (!session->final || save->gap_done || save->pos > save->gap_at ||
	    !vmt_deviates(session->dev, VMT_EARLY_EOF))
		return false;
	if (save->pos == save->gap_at) {
		save->gap_done = true;
		return true;
	}
	*count = min_t(u64, *count, save->gap_at - save->pos);
	return false;
}

ssize_t vmt_save_read(struct vmt_session *session, struct iov_iter *to, bool nonblock)
{
	struct vmt_dev *dev = session->dev;
	size_t count = iov_iter_count(to);
	struct vmt_fault fault;
	ssize_t ret;

	ret = vmt_session_begin_transfer(session, nonblock);
	if (ret)
		return ret;
	if (vmt_fault_take(dev, VMT_AT_READ, session->save.pos, &fault)) {
		mutex_unlock(&session->lock);
		ret = vmt_fault_act(dev, session, &fault, false);
		if (!ret)
			ret = vmt_session_begin_transfer(session, nonblock);
		if (ret)
			return ret;
	}
	if (session->config.read_most)
		count = min_t(u64, count, session->config.read_most);
	count = vmt_session_pace(session, count);
	count = min_t(u64, count, vmt_fault_distance(dev, VMT_AT_READ, session->save.pos));
	if (count && in_gap(session, &count))
		goto out;
	if (vmt_save_available(session))
		ret = copy_out(session, to, min_t(u64, count, vmt_save_available(session)));
	else if (count)
		ret = at_end(session, to);
out:
	vmt_session_moved(session, max_t(ssize_t, ret, 0));
	mutex_unlock(&session->lock);
	return ret;
}

/* Under session->lock. The n-th question may find that everything has to be sent again. */
static bool starts_over(struct vmt_session *session)
{
	struct vmt_save *save = &session->save;

	if (++save->infos != session->config.reinit_at)
		return false;
	save->offered = save->view.state->bytes;
	if (!save->view.state->headless)
		save->writes += vmt_pages(save->view.state);
	save->reinit_until = save->writes;
	return true;
}

static void tell(struct vmt_session *session, bool opted_in, struct vfio_precopy_info *info)
{
	struct vmt_save *save = &session->save;
	bool over = starts_over(session);
	u64 first = save->writes - pages_to_send(save);
	u64 again = 0;

	if (opted_in && save->reinit_until > first)
		again = save->reinit_until - first;
	info->initial_bytes = plain_left(session) + again * VMT_RECORD_BYTES;
	info->dirty_bytes = 0;
	if (save->offered == save->view.state->bytes)
		info->dirty_bytes = records_left(save) - again * VMT_RECORD_BYTES;
	if (opted_in)
		info->flags = over ? VMT_PRECOPY_INFO_REINIT : 0;
	else if (vmt_deviates(session->dev, VMT_REINIT_UNASKED))
		info->flags |= VMT_PRECOPY_INFO_REINIT;
}

/* Whether user space asked for flags that mean something. Under session->lock. */
static bool opted_in(struct vmt_session *session)
{
	if (session->detached)
		return false;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(7, 1, 0)
	return session->dev->vdev->precopy_info_v2;
#else
	return READ_ONCE(session->dev->precopy_info_v2);
#endif
}

long vmt_save_info(struct vmt_session *session, struct vfio_precopy_info __user *arg)
{
	size_t minsz = offsetofend(struct vfio_precopy_info, dirty_bytes);
	struct vfio_precopy_info info = {};
	struct vmt_fault fault;
	int err;

	if (copy_from_user(&info, arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz)
		return -EINVAL;
	if (vmt_fault_take(session->dev, VMT_AT_INFO, 0, &fault)) {
		err = vmt_fault_act(session->dev, session, &fault, false);
		if (err)
			return err;
	}
	if (mutex_lock_killable(&session->lock))
		return -EINTR;
	err = 0;
	if (session->dead)
		err = -ENODEV;
	else if (session->final && !vmt_deviates(session->dev, VMT_INFO_ANYWHERE))
		err = -EINVAL;
	if (!err) {
		advance(session);
		tell(session, opted_in(session), &info);
	}
	mutex_unlock(&session->lock);
	if (!err && copy_to_user(arg, &info, minsz))
		err = -EFAULT;
	return err;
}
