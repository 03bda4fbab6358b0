/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A VFIO device without hardware, to test programs that migrate VFIO devices.
 *
 * Locks, outermost first:
 *   state_mutex   the migration state, the held state, the settings; never taken uninterruptibly
 *                 but in open and close
 *   session.lock  one data session: its position, its buffers
 *   reset_mutex   deferred_reset only
 *   log.lock      the DMA log
 * A reset while state_mutex is held is applied when it is released (vmt_unlock()).
 * Nothing sleeps for long with session.lock held; hangs and bandwidth limits wait without it.
 */
#ifndef VFIOMIG_TEST_H
#define VFIOMIG_TEST_H

#include <linux/bits.h>
#include <linux/err.h>
#include <linux/kref.h>
#include <linux/ktime.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/rbtree.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/uio.h>
#include <linux/version.h>
#include <linux/vfio.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

#define VMT_NAME		"vfiomig_test"
#define VMT_PAGE_SHIFT		12
#define VMT_PAGE		4096UL
#define VMT_STATE_MOST		(1ULL << 50)
#define VMT_DIGEST_MOST		(1ULL << 36)	/* bytes */
#define VMT_LITERALS_MOST	16384U		/* 64 MiB */
#define VMT_FAULTS_MOST		64
#define VMT_HANG_MOST_MS	(24 * 3600 * 1000U)
#define VMT_LOG_PIECES_MOST	65536U
#define VMT_ALL			U64_MAX
#define VMT_TRUTH		(U64_MAX - MAX_ERRNO - 1)	/* below all that are errnos */
#define VMT_NO_PAGE		U64_MAX

#define VMT_REGION_SHIFT	40
#define VMT_NUM_REGIONS		9
#define VMT_NUM_IRQS		5
#define VMT_LEGACY_REGION	9
#define VMT_LEGACY_DATA		PAGE_SIZE	/* offset of the data section */

/* Newer than some headers this is built against. */
#define VMT_FEATURE_PRECOPY_INFO_V2	12
#define VMT_PRECOPY_INFO_REINIT		BIT(0)

enum vmt_check { VMT_CHECK_NONE, VMT_CHECK_WRITE, VMT_CHECK_COMMIT };

/* All u64, for the table of sysfs files in config.c. */
struct vmt_config {
	u64 capabilities;
	u64 state_bytes;
	u64 seed;
	u64 zero_percent;
	u64 initial_bytes;		/* VMT_ALL: as many as there are */
	u64 dirty_bytes_per_s;
	u64 drained;			/* 0: read() gives 0, 1: ENOMSG */
	u64 reinit_at;
	u64 bytes_per_s;
	u64 latency_us;
	u64 read_most;
	u64 write_most;
	u64 poll;
	u64 nonblock;
	u64 reported_bytes;		/* or VMT_TRUTH */
	u64 check;			/* enum vmt_check */
	u64 keeps_state;
	u64 reset_flag;
	u64 log_ranges_most;
	u64 log_page_min;
	u64 log_page_max;
	u64 region_data_bytes;
	u64 region_mmap;
	u64 region_framed;
};

/* In the stream and in BAR0, little-endian. */
struct vmt_header {
	__le64 magic;
	__le32 version;
	u8 zero_percent;
	u8 live;			/* updates and a closing record follow */
	u8 noise[2];			/* not checked; for deviations */
	__le64 seed;
	__le64 scratch;
	__le64 state_bytes;
	__le64 writes;
	__le64 damage;
	__le64 checksum;
};

struct vmt_record {
	__le64 magic;
	__le32 kind;			/* enum vmt_record_kind */
	__le32 bytes;			/* VMT_PAGE */
	__le64 ordinal;
	__le64 checksum;
};

enum vmt_record_kind { VMT_RECORD_PAGE = 1, VMT_RECORD_CLOSE = 2 };

#define VMT_RECORD_BYTES	(sizeof(struct vmt_record) + VMT_PAGE)

/*
 * What a device holds. Does not change once a device or a session has it, but for its count of
 * references. Pages are generated from seed, number and generation, but for the literal ones.
 */
struct vmt_state {
	struct kref ref;
	u64 bytes;
	u64 seed;
	u64 damage;			/* updates that a load without checks missed, as a number */
	u32 zero_percent;
	bool headless;			/* no header in the first page */
	u32 literals;
	struct xarray pages;		/* the literal pages, of VMT_PAGE bytes each */
};

/* A state and what changes in it while the device runs. */
struct vmt_view {
	struct vmt_state *state;
	u64 scratch;
	u64 writes;			/* pages written since the beginning, in cyclic order */
	u64 laps;			/* writes / pages and writes % pages, see vmt_view_set() */
	u64 edge;
};

enum vmt_where {
	VMT_AT_READ, VMT_AT_WRITE, VMT_AT_ARC, VMT_AT_ENTER, VMT_AT_ENTERED, VMT_AT_GET,
	VMT_AT_SIZE, VMT_AT_INFO, VMT_AT_RESET, VMT_AT_LOG_START, VMT_AT_LOG_REPORT,
	VMT_AT_LOG_STOP, VMT_AT_COUNT
};

enum vmt_action { VMT_ERRNO, VMT_ERROR, VMT_RESET, VMT_HANG, VMT_ACTION_COUNT };

struct vmt_fault {
	enum vmt_where where;
	enum vmt_action action;
	u64 arg;
	u32 value;
	u32 count;			/* 0: for ever */
};

enum vmt_deviation {
	VMT_NO_FD, VMT_SECOND_FD, VMT_PRECOPY_FD, VMT_ILLEGAL_ACCEPTED, VMT_ERROR_SETTABLE,
	VMT_RESTLESS, VMT_FORGETFUL, VMT_EOF_AGAIN, VMT_EARLY_EOF, VMT_INFO_ANYWHERE,
	VMT_REINIT_UNASKED, VMT_UNDEAD_FD, VMT_RESET_NO_RUN, VMT_RESET_KEEPS_FD, VMT_SEEKABLE,
	VMT_OVERWRITE, VMT_LOST_WRITE, VMT_WRITE_AFTER_ERROR, VMT_STICKY_LOG, VMT_LOG_TWICE,
	VMT_LOG_OVERLAP, VMT_DEVIATION_COUNT
};

/* How a session ends: what of it a deviation may keep alive. */
enum vmt_end { VMT_END_LEFT, VMT_END_RESET, VMT_END_CLOSED };

struct vmt_save {
	struct vmt_view view;		/* as the session began */
	u8 noise[2];
	bool live;
	bool closing;			/* a closing record is due */
	bool gap_done;			/* deviation early-eof */
	u8 ends;			/* deviation eof-again: reads that gave 0 */
	u64 pos;
	u64 offered;			/* of the plain state while in PRE_COPY */
	u64 writes;			/* now; those from sent on are to be sent as records */
	u64 sent;
	u64 clock_ns;
	u64 credit;			/* bytes of a page that is not yet written */
	u64 reinit_until;		/* records below this ordinal are initial data */
	u64 infos;
	u64 gap_at;
	u64 closing_scratch;
	u64 buf_page;			/* which page buf holds, or VMT_NO_PAGE */
	u64 record_at;			/* stream position of the record in buf */
};

struct vmt_load {
	struct vmt_view view;		/* what was loaded so far */
	struct vmt_header header;
	u64 got;
	u64 run_start;			/* first ordinal of the latest gapless run of records */
	u32 fill;			/* bytes in buf */
	bool has_header;
	bool live;
	bool closed;
	bool bad;			/* something was not as its header says */
	bool failed;			/* a write was refused */
	u8 *expected;
};

/* One data_fd, or what it would be with the legacy protocol. Outlives the device's interest. */
struct vmt_session {
	struct kref ref;
	struct vmt_dev *dev;
	u64 serial;			/* 1, 2, ... of this device */
	struct vmt_config config;	/* as the session began */
	struct mutex lock;
	wait_queue_head_t wait;
	struct delayed_work wake;	/* for poll() */
	bool loading;
	bool dead;			/* answers ENODEV */
	bool detached;			/* no longer the device's */
	bool final;			/* STOP_COPY was reached */
	bool asked;			/* latency_us runs */
	u64 ready_at;			/* ktime in ns before which nothing is transferred */
	u8 *buf;			/* VMT_RECORD_BYTES */
	union {
		struct vmt_save save;
		struct vmt_load load;
	};
};

struct vmt_log {
	struct mutex lock;
	bool on;
	u64 page;
	u32 nr_ranges;
	u32 nr_pieces;
	struct rb_root_cached ranges;	/* what is watched */
	struct rb_root_cached pieces;	/* what is dirty, disjoint */
};

struct vmt_legacy {
	struct mutex lock;		/* outside of state_mutex */
	void *data;			/* the data section; from open to close */
	size_t data_bytes;
	u32 reserved_bits;		/* of device_state, as last written */
	u64 serial;			/* of the session whose chunk it is */
	u64 chunk;			/* bytes that are ready in the data section */
	u64 chunks;			/* so many chunks of this session were made or taken */
};

struct vmt_dev {
	struct kref ref;
	struct mutex state_mutex;
	struct mutex reset_mutex;
	bool deferred_reset;
	bool legacy_type;
	bool opened;
	bool precopy_info_v2;
	bool loaded;			/* holds what a load brought: deviation forgetful */
	u8 saves;
	enum vfio_device_mig_state state;
	struct vfio_device *vdev;	/* while opened */
	struct vmt_config config;
	struct vmt_state *fresh;	/* what a reset gives */
	struct vmt_view held;
	struct vmt_session *session;
	u64 opens;
	u64 sessions;
	u64 arcs;
	unsigned long deviations;	/* bits of enum vmt_deviation; no lock */
	spinlock_t fault_lock;
	struct vmt_fault faults[VMT_FAULTS_MOST];
	int nr_faults;
	struct vmt_log log;
	struct vmt_legacy legacy;
	u64 bar_iova;
};

struct vmt_vfio {
	struct vfio_device vdev;
	struct vmt_dev *dev;
};

static inline struct vmt_dev *vmt_dev_of(struct vfio_device *vdev)
{
	return container_of(vdev, struct vmt_vfio, vdev)->dev;
}

static inline bool vmt_deviates(struct vmt_dev *dev, enum vmt_deviation deviation)
{
	return READ_ONCE(dev->deviations) & BIT(deviation);
}

static inline u64 vmt_pages(const struct vmt_state *state)
{
	return (state->bytes + VMT_PAGE - 1) >> VMT_PAGE_SHIFT;
}

/* main.c */
void vmt_dev_release(struct kref *ref);

/* config.c */
extern const struct attribute_group *vmt_groups[];
extern const struct vmt_config vmt_default_config;
extern const struct vfio_migration_ops vmt_migration_ops;

/* content.c */
struct vmt_state *vmt_state_new(const struct vmt_config *config);
void vmt_state_get(struct vmt_state *state);
void vmt_state_put(struct vmt_state *state);
int vmt_state_set_literal(struct vmt_state *state, u64 page, const u8 *content, size_t bytes);
void vmt_state_drop_literal(struct vmt_state *state, u64 page);
void vmt_view_set(struct vmt_view *view, u64 writes);
u64 vmt_view_generation(const struct vmt_view *view, u64 page);
void vmt_page(const struct vmt_state *state, u64 page, u64 generation, u8 *out);
void vmt_header_make(const struct vmt_view *view, struct vmt_header *header);
void vmt_header_seal(struct vmt_header *header);
bool vmt_header_good(const struct vmt_header *header);
void vmt_record_make(struct vmt_record *record, enum vmt_record_kind kind, u64 ordinal);
bool vmt_record_good(const struct vmt_record *record);
bool vmt_record_begins(const u8 *bytes, size_t count);
int vmt_digest(const struct vmt_view *view, u64 *digest);

/* faults.c */
bool vmt_fault_take(struct vmt_dev *dev, enum vmt_where where, u64 arg, struct vmt_fault *fault);
u64 vmt_fault_distance(struct vmt_dev *dev, enum vmt_where where, u64 arg);
int vmt_fault_act(struct vmt_dev *dev, struct vmt_session *session,
		  const struct vmt_fault *fault, bool locked);
int vmt_fault(struct vmt_dev *dev, enum vmt_where where, u64 arg, bool locked);
ssize_t vmt_faults_show(struct vmt_dev *dev, char *buf);
int vmt_faults_store(struct vmt_dev *dev, const char *buf);
ssize_t vmt_deviations_show(struct vmt_dev *dev, char *buf);
int vmt_deviations_store(struct vmt_dev *dev, const char *buf);

/* session.c */
struct vmt_session *vmt_session_new(struct vmt_dev *dev, bool loading);
void vmt_session_get(struct vmt_session *session);
void vmt_session_put(struct vmt_session *session);
struct file *vmt_session_file(struct vmt_session *session);
void vmt_session_end(struct vmt_dev *dev, enum vmt_end how);
int vmt_session_begin_transfer(struct vmt_session *session, bool nonblock);
void vmt_session_moved(struct vmt_session *session, size_t bytes);
size_t vmt_session_pace(const struct vmt_session *session, size_t count);

/* save.c */
int vmt_save_init(struct vmt_session *session);
void vmt_save_finalise(struct vmt_session *session);
void vmt_save_resume(struct vmt_session *session);
u64 vmt_save_writes(struct vmt_session *session);
u64 vmt_save_available(struct vmt_session *session);
ssize_t vmt_save_read(struct vmt_session *session, struct iov_iter *to, bool nonblock);
long vmt_save_info(struct vmt_session *session, struct vfio_precopy_info __user *arg);

/* load.c */
int vmt_load_init(struct vmt_session *session);
ssize_t vmt_load_write(struct vmt_session *session, struct iov_iter *from, bool nonblock);
int vmt_load_commit(struct vmt_session *session);

/* migration.c */
const char *vmt_state_name(enum vfio_device_mig_state state);
void vmt_unlock(struct vmt_dev *dev);
void vmt_reset(struct vmt_dev *dev);
int vmt_reset_asked(struct vmt_dev *dev);
void vmt_renew(struct vmt_dev *dev);
void vmt_enter_error(struct vmt_dev *dev);
int vmt_view_now(struct vmt_dev *dev, struct vmt_view *view);
int vmt_step(struct vmt_dev *dev, enum vfio_device_mig_state next, struct file **file);
int vmt_device_feature(struct vfio_device *vdev, u32 flags, void __user *arg, size_t argsz);

/* region.c */
ssize_t vmt_region_read(struct vfio_device *vdev, char __user *buf, size_t count, loff_t *ppos);
ssize_t vmt_region_write(struct vfio_device *vdev, const char __user *buf, size_t count,
			 loff_t *ppos);
int vmt_region_mmap(struct vfio_device *vdev, struct vm_area_struct *vma);
int vmt_region_info(struct vfio_device *vdev, struct vfio_region_info *info,
		    struct vfio_info_cap *caps);
u32 vmt_num_regions(const struct vmt_dev *dev);

/* legacy.c */
int vmt_legacy_open(struct vmt_dev *dev);
void vmt_legacy_close(struct vmt_dev *dev);
size_t vmt_legacy_region_bytes(const struct vmt_dev *dev);
int vmt_legacy_caps(struct vmt_dev *dev, struct vfio_info_cap *caps);
int vmt_legacy_mmap(struct vmt_dev *dev, struct vm_area_struct *vma);
ssize_t vmt_legacy_read(struct vmt_dev *dev, char __user *buf, size_t count, u64 offset);
ssize_t vmt_legacy_write(struct vmt_dev *dev, const char __user *buf, size_t count, u64 offset);

/* dirty_log.c */
extern const struct vfio_log_ops vmt_log_ops;
void vmt_log_init(struct vmt_log *log);
void vmt_log_stop(struct vmt_log *log);
int vmt_log_mark(struct vmt_log *log, u64 iova, u64 length);

#endif
