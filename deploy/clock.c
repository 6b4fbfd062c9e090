/* A clock 400 days ahead, for `make elsewhere`: cc -shared -fPIC deploy/clock.c -o clock.so -ldl; LD_PRELOAD=clock.so ...
 * Only the wall clock moves. libfaketime also moves the deadlines of sleeps, which Python then refuses or waits for
 * forever. Times of files are those of the kernel. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <semaphore.h>
#include <sys/time.h>
#include <time.h>

#define AHEAD (400 * 86400L)
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int is_wall(clockid_t clock) { return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    static __typeof__(&clock_gettime) real;
    if (!real) real = REAL(clock_gettime);
    int result = real(clock, now);
    if (!result && is_wall(clock)) now->tv_sec += AHEAD;
    return result;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec, now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    return now ? *now = precise.tv_sec : precise.tv_sec;
}

/* Deadlines that a program computed from the wall clock, for the kernel, whose clock is right. */
static struct timespec kernels(const struct timespec *deadline) {
    struct timespec found = *deadline;
    if (found.tv_sec > time(NULL) - AHEAD / 2) found.tv_sec -= AHEAD;
    return found;
}

#define WAIT(name, parameters, ...)                                    \
    int name parameters {                                              \
        struct timespec until = kernels(deadline);                     \
        return REAL(name)(__VA_ARGS__);                                \
    }
WAIT(pthread_cond_timedwait, (pthread_cond_t *c, pthread_mutex_t *m, const struct timespec *deadline), c, m, &until)
WAIT(pthread_cond_clockwait, (pthread_cond_t *c, pthread_mutex_t *m, clockid_t k, const struct timespec *deadline), c, m, k, &until)
WAIT(pthread_mutex_timedlock, (pthread_mutex_t *m, const struct timespec *deadline), m, &until)
WAIT(sem_timedwait, (sem_t *s, const struct timespec *deadline), s, &until)
WAIT(sem_clockwait, (sem_t *s, clockid_t k, const struct timespec *deadline), s, k, &until)
