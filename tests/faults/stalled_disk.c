/* A disk that stalls: while the file named by STALLED exists, every sync takes three seconds. */

#if defined(__x86_64__)
enum { FSYNC = 74, FDATASYNC = 75 };
#elif defined(__aarch64__)
enum { FSYNC = 82, FDATASYNC = 83 };
#endif
enum { STALL_US = 3000000, EXISTS = 0 };

extern char *getenv(const char *);
extern int access(const char *, int);
extern int usleep(unsigned);
extern long syscall(long, ...);

static int synced(long call, int fd) {
    if (access(getenv("STALLED"), EXISTS) == 0)
        usleep(STALL_US);
    return (int)syscall(call, fd);
}

int fsync(int fd) { return synced(FSYNC, fd); }
int fdatasync(int fd) { return synced(FDATASYNC, fd); }
