// SPDX-License-Identifier: GPL-2.0
/*
 * DMA logging. What was written is kept as disjoint ranges of log pages; when there are too many
 * of them, the gap before the newest is filled: too much is reported then, never too little.
 */

#include <linux/interval_tree.h>
#include <linux/iova_bitmap.h>
#include <linux/log2.h>
#include <linux/module.h>
#include <linux/slab.h>

#include "vfiomig_test.h"

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
MODULE_IMPORT_NS("IOMMUFD");
#else
MODULE_IMPORT_NS(IOMMUFD);
#endif

void vmt_log_init(struct vmt_log *log)
{
	mutex_init(&log->lock);
	log->ranges = RB_ROOT_CACHED;
	log->pieces = RB_ROOT_CACHED;
}

static void forget_tree(struct rb_root_cached *root)
{
	struct interval_tree_node *node;

	while ((node = interval_tree_iter_first(root, 0, ULONG_MAX))) {
		interval_tree_remove(node, root);
		kfree(node);
		cond_resched();
	}
}

static void forget(struct vmt_log *log)
{
	forget_tree(&log->ranges);
	forget_tree(&log->pieces);
	log->nr_ranges = 0;
	log->nr_pieces = 0;
	log->on = false;
}

void vmt_log_stop(struct vmt_log *log)
{
	mutex_lock(&log->lock);
	forget(log);
	mutex_unlock(&log->lock);
}

static int add_node(struct rb_root_cached *root, unsigned long start, unsigned long last)
{
	struct interval_tree_node *node = kzalloc(sizeof(*node), GFP_KERNEL_ACCOUNT);

	if (!node)
		return -ENOMEM;
	node->start = start;
	node->last = last;
	interval_tree_insert(node, root);
	return 0;
}

static int copy_ranges(struct vmt_log *log, struct rb_root_cached *ranges)
{
	struct interval_tree_node *node;
	int err;

	for (node = interval_tree_iter_first(ranges, 0, ULONG_MAX); node;
	     node = interval_tree_iter_next(node, 0, ULONG_MAX)) {
		/* The core lets a range of no bytes pass. */
		if (node->last < node->start)
			return -EINVAL;
		err = add_node(&log->ranges, node->start, node->last);
		if (err)
			return err;
		log->nr_ranges++;
	}
	return 0;
}

static int log_start(struct vfio_device *vdev, struct rb_root_cached *ranges, u32 nnodes,
		     u64 *page_size)
{
	struct vmt_dev *dev = vmt_dev_of(vdev);
	struct vmt_log *log = &dev->log;
	u64 most = READ_ONCE(dev->config.log_ranges_most);
	u64 page = clamp(*page_size, dev->config.log_page_min, dev->config.log_page_max);
	int err = vmt_fault(dev, VMT_AT_LOG_START, 0, false);

	if (err)
		return err;
	if (!is_power_of_2(page))
		return -EINVAL;
	mutex_lock(&log->lock);
	if (log->on && !vmt_deviates(dev, VMT_LOG_TWICE)) {
		mutex_unlock(&log->lock);
		return -EINVAL;
	}
	forget(log);
	if (nnodes > most)
		vfio_combine_iova_ranges(ranges, nnodes, most);
	err = copy_ranges(log, ranges);
	if (err) {
		forget(log);
	} else {
		log->on = true;
		log->page = page;
		*page_size = page;
	}
	mutex_unlock(&log->lock);
	return err;
}

static int log_stop(struct vfio_device *vdev)
{
	struct vmt_dev *dev = vmt_dev_of(vdev);
	int err = vmt_fault(dev, VMT_AT_LOG_STOP, 0, false);

	if (!err)
		vmt_log_stop(&dev->log);
	return err;
}

/* The piece that ends last below start. */
static struct interval_tree_node *before(struct vmt_log *log, unsigned long start)
{
	struct rb_node *rb = log->pieces.rb_root.rb_node;
	struct interval_tree_node *found = NULL;

	while (rb) {
		struct interval_tree_node *node = rb_entry(rb, struct interval_tree_node, rb);

		if (node->start < start) {
			found = node;
			rb = rb->rb_right;
		} else {
			rb = rb->rb_left;
		}
	}
	return found;
}

/* Adds a piece, swallowing those that it meets. Its neighbour is filled up to if there are many. */
static int add_piece(struct vmt_log *log, unsigned long start, unsigned long last)
{
	struct interval_tree_node *node;
	int err;

	if (log->nr_pieces >= VMT_LOG_PIECES_MOST) {
		node = before(log, start) ?: interval_tree_iter_first(&log->pieces, 0, ULONG_MAX);
		start = min(start, node->start);
		last = max(last, node->last);
	}
	while ((node = interval_tree_iter_first(&log->pieces, start, last))) {
		start = min(start, node->start);
		last = max(last, node->last);
		interval_tree_remove(node, &log->pieces);
		log->nr_pieces--;
		kfree(node);
	}
	err = add_node(&log->pieces, start, last);
	if (!err)
		log->nr_pieces++;
	return err;
}

/* The device wrote there. Only what is watched is logged, in whole log pages. */
int vmt_log_mark(struct vmt_log *log, u64 iova, u64 length)
{
	struct interval_tree_node *range;
	u64 last = iova + length - 1;
	int err = 0;

	if (!length)
		return 0;
	if (last < iova)
		return -EOVERFLOW;
	if (mutex_lock_killable(&log->lock))
		return -EINTR;
	if (log->on) {
		iova = round_down(iova, log->page);
		last |= log->page - 1;
		for (range = interval_tree_iter_first(&log->ranges, iova, last); range && !err;
		     range = interval_tree_iter_next(range, iova, last))
			err = add_piece(log, max_t(u64, iova, range->start),
					min_t(u64, last, range->last));
	}
	mutex_unlock(&log->lock);
	return err;
}

static void report(struct vmt_dev *dev, struct iova_bitmap *dirty, unsigned long start,
		   unsigned long last, unsigned long end)
{
	if (vmt_deviates(dev, VMT_LOG_OVERLAP))
		last = min(end, last > ULONG_MAX - (last - start + 1) ?
				ULONG_MAX : last + (last - start + 1));
	iova_bitmap_set(dirty, start, last - start + 1);
}

/* What is left of a piece when start..last is taken out of it. */
static int take_out(struct vmt_log *log, struct interval_tree_node *piece, unsigned long start,
		    unsigned long last)
{
	unsigned long old_start = piece->start, old_last = piece->last;
	int err = 0;

	if (old_start < start && old_last > last) {
		err = add_node(&log->pieces, last + 1, old_last);
		if (err)
			return err;
		log->nr_pieces++;
	}
	interval_tree_remove(piece, &log->pieces);
	if (old_start < start) {
		piece->last = start - 1;
		interval_tree_insert(piece, &log->pieces);
	} else if (old_last > last) {
		piece->start = last + 1;
		interval_tree_insert(piece, &log->pieces);
	} else {
		log->nr_pieces--;
		kfree(piece);
	}
	return 0;
}

static int log_read_and_clear(struct vfio_device *vdev, unsigned long iova, unsigned long length,
			      struct iova_bitmap *dirty)
{
	struct vmt_dev *dev = vmt_dev_of(vdev);
	struct vmt_log *log = &dev->log;
	unsigned long end = iova + length - 1;
	struct interval_tree_node *piece;
	unsigned long next = iova;
	int err = vmt_fault(dev, VMT_AT_LOG_REPORT, 0, false);

	if (err || !length)
		return err;
	if (mutex_lock_killable(&log->lock))
		return -EINTR;
	if (!log->on)
		err = -EINVAL;
	while (!err && (piece = interval_tree_iter_first(&log->pieces, next, end))) {
		unsigned long start = max(piece->start, iova), last = min(piece->last, end);

		report(dev, dirty, start, last, end);
		if (!vmt_deviates(dev, VMT_STICKY_LOG))
			err = take_out(log, piece, start, last);
		if (last == end)
			break;
		next = last + 1;
		cond_resched();
	}
	mutex_unlock(&log->lock);
	return err;
}

const struct vfio_log_ops vmt_log_ops = {
	.log_start = log_start,
	.log_stop = log_stop,
	.log_read_and_clear = log_read_and_clear,
};
