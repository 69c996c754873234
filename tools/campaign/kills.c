// Preloaded by kills.py: counts the calls that change files and raises a signal at one of them.
//
// A call is counted if it creates, opens for writing, writes, renames, links, removes or flushes a
// regular file or a directory. At the call with the number given to kills_arm the signal is raised:
// before the call or, for a write, after half of its bytes.
#define _GNU_SOURCE
#undef _FILE_OFFSET_BITS
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long calls;
static long target;  // 0: count only
static int number;   // signal number
static int in_half;  // whether a write is interrupted after half of its bytes
static atomic_int armed;

void kills_arm(long call, int signal_number, int half) {
  target = call;
  number = signal_number;
  in_half = half;
  atomic_store(&calls, 0);
  atomic_store(&armed, 1);
}

long kills_count(void) { return atomic_load(&calls); }

static int is_due(void) { return atomic_load(&armed) && atomic_fetch_add(&calls, 1) + 1 == target; }

static void raise_signal(void) { kill(getpid(), number); }

static void count(void) {
  if (is_due()) raise_signal();
}

static int is_regular(int descriptor) {
  struct stat status;
  return fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define WRITES (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)

#define OPEN(name)                             \
  int name(const char* path, int flags, ...) { \
    va_list arguments;                         \
    va_start(arguments, flags);                \
    mode_t mode = va_arg(arguments, mode_t);   \
    va_end(arguments);                         \
    if (flags & WRITES) count();               \
    return NEXT(name)(path, flags, mode);      \
  }
OPEN(open)
OPEN(open64)

#define OPEN_AT(name)                                         \
  int name(int directory, const char* path, int flags, ...) { \
    va_list arguments;                                        \
    va_start(arguments, flags);                               \
    mode_t mode = va_arg(arguments, mode_t);                  \
    va_end(arguments);                                        \
    if (flags & WRITES) count();                              \
    return NEXT(name)(directory, path, flags, mode);          \
  }
OPEN_AT(openat)
OPEN_AT(openat64)

ssize_t write(int descriptor, const void* bytes, size_t size) {
  if (is_regular(descriptor) && is_due()) {
    if (in_half && size > 1) {
      ssize_t written = NEXT(write)(descriptor, bytes, size / 2);
      raise_signal();
      return written;
    }
    raise_signal();
  }
  return NEXT(write)(descriptor, bytes, size);
}

#define PWRITE(name, offset_type)                                                    \
  ssize_t name(int descriptor, const void* bytes, size_t size, offset_type offset) { \
    if (is_regular(descriptor) && is_due()) {                                        \
      if (in_half && size > 1) NEXT(name)(descriptor, bytes, size / 2, offset);      \
      raise_signal();                                                                \
    }                                                                                \
    return NEXT(name)(descriptor, bytes, size, offset);                              \
  }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int descriptor, const struct iovec* parts, int n_parts) {
  if (is_regular(descriptor) && is_due()) {
    if (in_half && n_parts > 1) NEXT(writev)(descriptor, parts, n_parts / 2);
    raise_signal();
  }
  return NEXT(writev)(descriptor, parts, n_parts);
}

ssize_t copy_file_range(int in, off64_t* in_offset, int out, off64_t* out_offset, size_t size,
                        unsigned flags) {
  count();
  return NEXT(copy_file_range)(in, in_offset, out, out_offset, size, flags);
}

#define COUNTED(name, parameters, arguments) \
  int name parameters {                      \
    count();                                 \
    return NEXT(name) arguments;             \
  }
COUNTED(rename, (const char* from, const char* to), (from, to))
COUNTED(renameat, (int at, const char* from, int to_at, const char* to), (at, from, to_at, to))
COUNTED(renameat2, (int at, const char* from, int to_at, const char* to, unsigned flags),
        (at, from, to_at, to, flags))
COUNTED(link, (const char* from, const char* to), (from, to))
COUNTED(linkat, (int at, const char* from, int to_at, const char* to, int flags),
        (at, from, to_at, to, flags))
COUNTED(symlink, (const char* from, const char* to), (from, to))
COUNTED(symlinkat, (const char* from, int at, const char* to), (from, at, to))
COUNTED(unlink, (const char* path), (path))
COUNTED(unlinkat, (int at, const char* path, int flags), (at, path, flags))
COUNTED(mkdir, (const char* path, mode_t mode), (path, mode))
COUNTED(mkdirat, (int at, const char* path, mode_t mode), (at, path, mode))
COUNTED(rmdir, (const char* path), (path))
COUNTED(fsync, (int descriptor), (descriptor))
COUNTED(fdatasync, (int descriptor), (descriptor))
COUNTED(ftruncate, (int descriptor, off_t size), (descriptor, size))
COUNTED(ftruncate64, (int descriptor, off64_t size), (descriptor, size))
COUNTED(truncate, (const char* path, off_t size), (path, size))
COUNTED(truncate64, (const char* path, off64_t size), (path, size))
COUNTED(posix_fallocate, (int descriptor, off_t start, off_t size), (descriptor, start, size))
COUNTED(posix_fallocate64, (int descriptor, off64_t start, off64_t size), (descriptor, start, size))
