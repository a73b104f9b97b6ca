/* One pool of threads for the process. Work is taken item by item, so that a core that others use slows only its items;
   a worker that sleeps through a job is not waited for. */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#include "native.h"

enum {
    SPINS = 20000,      /* some 100 us: as long as the gap between two tokens, then the worker sleeps */
    SPINS_A_YIELD = 512 /* who waits lets others have its core: with more threads than cores one of them may hold an item */
};

#if defined(__x86_64__)
#define relax() __builtin_ia32_pause()
#else
#define relax() ((void)0)
#endif

static struct {
    _Atomic int workers;
    _Atomic uint64_t ticket; /* job number << 32 | next item: claiming an item checks that its job still is the job */
    _Atomic uint32_t items, finished;
    _Atomic int sleepers;
    _Atomic uint32_t calls; /* times that sleepers were told of work to come */
    _Atomic int resting;    /* nothing comes for a while: nobody spins */
    atomic_flag busy;
    _Atomic(void *) context;
    void (*_Atomic f)(void *, int, int);
    int knows_forks;
    pthread_mutex_t lock; /* of sleep, and of starting */
    pthread_cond_t wake;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .busy = ATOMIC_FLAG_INIT};

static uint32_t job_of(uint64_t ticket) { return (uint32_t)(ticket >> 32); }

static void spin(int times) {
    if (times % SPINS_A_YIELD) relax();
    else sched_yield();
}

static void work(int number) {
    uint64_t ticket = atomic_load(&pool.ticket);
    for (;;) {
        /* Read before the claim: if the job changed meanwhile, so did the ticket, and the claim fails. */
        void (*f)(void *, int, int) = atomic_load(&pool.f);
        void *context = atomic_load(&pool.context);
        uint32_t item = (uint32_t)ticket;
        if (item >= atomic_load(&pool.items)) return;
        if (atomic_compare_exchange_weak(&pool.ticket, &ticket, ticket + 1)) {
            f(context, (int)item, number);
            atomic_fetch_add(&pool.finished, 1);
            ticket = atomic_load(&pool.ticket);
        }
    }
}

/* Until there is another job, or one is announced. */
static void sleep_until_changed(uint32_t job, uint32_t calls) {
    pthread_mutex_lock(&pool.lock);
    atomic_fetch_add(&pool.sleepers, 1);
    while (job_of(atomic_load(&pool.ticket)) == job && atomic_load(&pool.calls) == calls)
        pthread_cond_wait(&pool.wake, &pool.lock);
    atomic_fetch_sub(&pool.sleepers, 1);
    pthread_mutex_unlock(&pool.lock);
}

static void *worker(void *number) {
    uint32_t job = 0;
    for (;;) {
        const uint32_t calls = atomic_load(&pool.calls);
        for (int i = 1; i <= SPINS && job_of(atomic_load(&pool.ticket)) == job && !atomic_load(&pool.resting); i++) spin(i);
        if (job_of(atomic_load(&pool.ticket)) == job) sleep_until_changed(job, calls);
        if (job_of(atomic_load(&pool.ticket)) == job) continue; /* announced, not there yet */
        job = job_of(atomic_load(&pool.ticket));
        work((int)(intptr_t)number);
    }
    return NULL;
}

/* A fork's child has this memory and none of the threads, and the lock as some thread held it. */
static void forget_the_threads(void) {
    atomic_store(&pool.workers, 0);
    atomic_store(&pool.sleepers, 0);
    atomic_store(&pool.items, 0);
    atomic_store(&pool.ticket, 0);
    atomic_flag_clear(&pool.busy);
    pool.lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    pool.wake = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
}

int ew_pool_start(int threads) {
    pthread_mutex_lock(&pool.lock); /* each worker has a number of its own, whoever starts them at once */
    if (!pool.knows_forks) pool.knows_forks = !pthread_atfork(NULL, NULL, forget_the_threads);
    while (pool.workers < threads - 1) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, worker, (void *)(intptr_t)(pool.workers + 1))) break;
        pthread_detach(thread);
        pool.workers++;
    }
    const int there = pool.workers + 1;
    pthread_mutex_unlock(&pool.lock);
    return there;
}

static void wake_sleepers(void) {
    if (!atomic_load(&pool.sleepers)) return;
    pthread_mutex_lock(&pool.lock);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
}

void ew_pool_rest(void) { atomic_store(&pool.resting, 1); }

void ew_pool_announce(void) {
    atomic_store(&pool.resting, 0);
    atomic_fetch_add(&pool.calls, 1);
    wake_sleepers();
}

void ew_parallel(int items, void (*f)(void *, int, int), void *context) {
    if (pool.workers == 0 || items < 2 || atomic_flag_test_and_set(&pool.busy)) { /* another model has the pool */
        for (int i = 0; i < items; i++) f(context, i, 0);
        return;
    }
    const uint64_t job = job_of(atomic_load(&pool.ticket));
    atomic_store(&pool.resting, 0);
    atomic_store(&pool.ticket, job << 32 | UINT32_MAX); /* a late worker must not claim an item of a job half written */
    atomic_store(&pool.finished, 0);
    atomic_store(&pool.f, f);
    atomic_store(&pool.context, context);
    atomic_store(&pool.items, (uint32_t)items);
    atomic_store(&pool.ticket, (job + 1) << 32);
    wake_sleepers();
    work(0);
    for (int i = 1; atomic_load(&pool.finished) < (uint32_t)items; i++) spin(i);
    atomic_flag_clear(&pool.busy);
}
