// SPDX-License-Identifier: GPL-2.0
/*
 * The stream into a resuming device. It is taken apart page by page and record by record, each
 * compared with what its header promises; what differs is kept literally, and remembered.
 */

#include <linux/file.h>
#include <linux/math64.h>
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/uaccess.h>

#include "vfiomig_test.h"

/* Under state_mutex. */
int vmt_load_init(struct vmt_session *session)
{
	struct vmt_load *load = &session->load;

	load->view.state = vmt_state_new(&session->config);
	load->expected = kzalloc(VMT_PAGE, GFP_KERNEL_ACCOUNT);
	if (!load->view.state || !load->expected)
		return -ENOMEM;
	/* Until a header says otherwise. */
	load->view.state->headless = true;
	load->view.state->bytes = 0;
	return 0;
}

/* A device whose own state has no header takes only such states. */
static bool is_tiny(const struct vmt_session *session)
{
	return session->config.state_bytes < sizeof(struct vmt_header);
}

static bool in_records(const struct vmt_load *load)
{
	return load->has_header && load->got - load->fill >= load->view.state->bytes;
}

static u64 page_now(const struct vmt_load *load)
{
	return (load->got - load->fill) >> VMT_PAGE_SHIFT;
}

/* How many bytes buf is to have before it is looked at. */
static u32 wanted(const struct vmt_session *session)
{
	const struct vmt_load *load = &session->load;
	u64 start = load->got - load->fill;

	if (in_records(load))
		return load->fill < sizeof(struct vmt_record) ? sizeof(struct vmt_record) :
								VMT_RECORD_BYTES;
	if (!start && load->fill < sizeof(struct vmt_header) && !is_tiny(session))
		return sizeof(struct vmt_header);
	if (load->has_header)
		return min_t(u64, VMT_PAGE, load->view.state->bytes - start);
	return VMT_PAGE;
}

/* Something is wrong. 0: it is only remembered. */
static int found_bad(struct vmt_session *session)
{
	if (session->config.check == VMT_CHECK_NONE)
		return 0;
	if (session->config.check == VMT_CHECK_WRITE) {
		if (!vmt_deviates(session->dev, VMT_WRITE_AFTER_ERROR))
			session->load.bad = true;
		return -EINVAL;
	}
	session->load.bad = true;
	return 0;
}

static int keep(struct vmt_session *session, u64 page, const u8 *content, size_t bytes)
{
	int err = vmt_state_set_literal(session->load.view.state, page, content, bytes);

	/* It will not be committed, so it need not be complete. */
	if (err == -ENOSPC && session->load.bad)
		return 0;
	return err;
}

static int take_header(struct vmt_session *session)
{
	struct vmt_load *load = &session->load;
	struct vmt_state *state = load->view.state;

	memcpy(&load->header, session->buf, sizeof(load->header));
	if (!vmt_header_good(&load->header))
		return found_bad(session);
	load->has_header = true;
	load->live = load->header.live;
	state->headless = false;
	state->bytes = le64_to_cpu(load->header.state_bytes);
	state->seed = le64_to_cpu(load->header.seed);
	state->damage = le64_to_cpu(load->header.damage);
	state->zero_percent = load->header.zero_percent;
	load->view.scratch = le64_to_cpu(load->header.scratch);
	vmt_view_set(&load->view, le64_to_cpu(load->header.writes));
	load->run_start = load->view.writes;
	return 0;
}

/* content: VMT_PAGE bytes of which the first are to be looked at. */
static int take_content(struct vmt_session *session, u64 page, u64 generation, u8 *content,
			size_t bytes)
{
	struct vmt_load *load = &session->load;
	size_t skip = page ? 0 : sizeof(struct vmt_header);
	int err;

	vmt_state_drop_literal(load->view.state, page);
	vmt_page(load->view.state, page, generation, load->expected);
	if (bytes <= skip || !memcmp(content + skip, load->expected + skip, bytes - skip))
		return 0;
	err = found_bad(session);
	return keep(session, page, content, bytes) ?: err;
}

static int take_page(struct vmt_session *session, size_t bytes)
{
	struct vmt_load *load = &session->load;
	u64 page = page_now(load);

	if (load->has_header)
		return take_content(session, page, vmt_view_generation(&load->view, page),
				    session->buf, bytes);
	return keep(session, page, session->buf, bytes);
}

static int take_closing(struct vmt_session *session, const struct vmt_header *header)
{
	struct vmt_load *load = &session->load;
	struct vmt_state *state = load->view.state;

	if (!vmt_header_good(header) || le64_to_cpu(header->writes) != load->view.writes ||
	    le64_to_cpu(header->seed) != state->seed ||
	    le64_to_cpu(header->state_bytes) != state->bytes ||
	    header->zero_percent != state->zero_percent ||
	    memchr_inv(header + 1, 0, VMT_PAGE - sizeof(*header)))
		return found_bad(session);
	load->view.scratch = le64_to_cpu(header->scratch);
	load->closed = true;
	return 0;
}

static int take_record(struct vmt_session *session)
{
	struct vmt_record *record = (struct vmt_record *)session->buf;
	u8 *payload = session->buf + sizeof(*record);
	struct vmt_load *load = &session->load;
	u64 ordinal = le64_to_cpu(record->ordinal);
	u64 page, lap;

	if (le32_to_cpu(record->kind) == VMT_RECORD_CLOSE)
		return take_closing(session, (struct vmt_header *)payload);
	if (load->closed || ordinal < load->view.writes)
		return found_bad(session);
	if (ordinal != load->view.writes)
		load->run_start = ordinal;
	lap = div64_u64_rem(ordinal, vmt_pages(load->view.state), &page);
	vmt_view_set(&load->view, ordinal + 1);
	return take_content(session, page, lap + 1, payload, VMT_PAGE);
}

/* buf has what was wanted. */
static int take(struct vmt_session *session)
{
	struct vmt_load *load = &session->load;
	int err;

	if (in_records(load) && load->fill == sizeof(struct vmt_record))
		return vmt_record_good((struct vmt_record *)session->buf) ? 0 : -EINVAL;
	if (in_records(load)) {
		err = take_record(session);
	} else if (!page_now(load) && load->fill == sizeof(struct vmt_header) &&
		   !load->has_header && !is_tiny(session)) {
		err = take_header(session);
		if (!load->has_header || load->view.state->bytes > sizeof(struct vmt_header))
			return err;
	} else {
		err = take_page(session, load->fill);
	}
	load->fill = 0;
	return err;
}

/* Bytes that can not belong to the state. */
static int is_beyond(struct vmt_session *session)
{
	struct vmt_load *load = &session->load;

	if (is_tiny(session))
		return load->got > session->config.state_bytes;
	return in_records(load) && !vmt_record_begins(session->buf, load->fill);
}

static ssize_t copy_in(struct vmt_session *session, struct iov_iter *from, size_t count)
{
	struct vmt_load *load = &session->load;
	size_t done = 0;
	int err;

	while (done < count) {
		u32 want = wanted(session);
		size_t chunk = min_t(size_t, count - done, want - load->fill);
		size_t copied = copy_from_iter(session->buf + load->fill, chunk, from);

		if (!copied)
			return done ?: -EFAULT;
		load->fill += copied;
		load->got += copied;
		done += copied;
		if (is_beyond(session)) {
			if (!vmt_deviates(session->dev, VMT_OVERWRITE))
				return -ENOMEM;
			chunk = is_tiny(session) ? load->got - session->config.state_bytes :
						   load->fill;
			load->got -= chunk;
			load->fill -= chunk;
			iov_iter_advance(from, count - done);
			return count;
		}
		err = load->fill == want ? take(session) : 0;
		if (err)
			return err;
		if (copied < chunk || fatal_signal_pending(current))
			break;
		cond_resched();
	}
	return done;
}

static ssize_t take_some(struct vmt_session *session, struct iov_iter *from, size_t count)
{
	bool lossy = count > 1 && vmt_deviates(session->dev, VMT_LOST_WRITE);
	ssize_t ret;

	if (session->load.failed)
		return -ENODEV;
	ret = copy_in(session, from, count - lossy);
	if (lossy && ret == count - 1) {
		iov_iter_advance(from, 1);
		ret++;
	}
	return ret;
}

/* The session is of no use any more, but a bad pointer does no harm. */
static void refuse(struct vmt_session *session, ssize_t err)
{
	if (err == -EFAULT || vmt_deviates(session->dev, VMT_WRITE_AFTER_ERROR))
		return;
	session->load.failed = true;
}

static int strike(struct vmt_session *session, const struct vmt_fault *fault, bool nonblock)
{
	int again, err;

	mutex_unlock(&session->lock);
	err = vmt_fault_act(session->dev, session, fault, false);
	if (err == -EINTR)
		return err;
	again = vmt_session_begin_transfer(session, nonblock);
	if (again)
		return err ?: again;
	if (!err)
		return 0;
	refuse(session, err);
	mutex_unlock(&session->lock);
	return err;
}

ssize_t vmt_load_write(struct vmt_session *session, struct iov_iter *from, bool nonblock)
{
	struct vmt_dev *dev = session->dev;
	size_t count = iov_iter_count(from);
	struct vmt_fault fault;
	ssize_t ret;

	ret = vmt_session_begin_transfer(session, nonblock);
	if (ret)
		return ret;
	if (vmt_fault_take(dev, VMT_AT_WRITE, session->load.got, &fault)) {
		ret = strike(session, &fault, nonblock);
		if (ret)
			return ret;
	}
	if (session->config.write_most)
		count = min_t(u64, count, session->config.write_most);
	count = vmt_session_pace(session, count);
	count = min_t(u64, count, vmt_fault_distance(dev, VMT_AT_WRITE, session->load.got));
	ret = take_some(session, from, count);
	if (ret < 0)
		refuse(session, ret);
	vmt_session_moved(session, max_t(ssize_t, ret, 0));
	mutex_unlock(&session->lock);
	return ret;
}

/* Whether all updates since the plain state have come, each page's last one that is. */
static bool is_whole(const struct vmt_load *load)
{
	u64 pages = vmt_pages(load->view.state);
	u64 oldest = load->view.writes - min(load->view.writes, pages);

	return load->run_start <= max(oldest, le64_to_cpu(load->header.writes));
}

/* Makes a state of whatever there is. */
static int settle(struct vmt_session *session)
{
	struct vmt_load *load = &session->load;
	struct vmt_state *state = load->view.state;
	int err = 0;

	if (load->fill && !in_records(load))
		err = take_page(session, load->fill);
	if (!load->has_header) {
		state->bytes = load->got;
	} else if (load->got < state->bytes) {
		state->bytes = load->got;
		vmt_view_set(&load->view, load->view.writes);
	} else if (!is_whole(load)) {
		state->damage += load->run_start;
	}
	load->fill = 0;
	return err;
}

static bool is_good(const struct vmt_session *session)
{
	const struct vmt_load *load = &session->load;

	if (load->bad)
		return false;
	if (is_tiny(session))
		return load->got == session->config.state_bytes;
	return load->has_header && load->got >= load->view.state->bytes && !load->fill &&
	       (load->closed || !load->live) && is_whole(load);
}

/* Under state_mutex. The device now holds what was loaded. */
int vmt_load_commit(struct vmt_session *session)
{
	struct vmt_load *load = &session->load;
	struct vmt_dev *dev = session->dev;
	bool forgiving = session->config.check == VMT_CHECK_NONE ||
			 vmt_deviates(dev, VMT_WRITE_AFTER_ERROR);
	int err = 0;

	mutex_lock(&session->lock);
	if (load->failed || (!forgiving && !is_good(session)))
		err = -EINVAL;
	else if (!load->has_header || !is_good(session))
		err = settle(session);
	if (!err) {
		vmt_state_put(dev->held.state);
		dev->held = load->view;
		vmt_state_get(dev->held.state);
		dev->loaded = true;
	}
	mutex_unlock(&session->lock);
	return err;
}
