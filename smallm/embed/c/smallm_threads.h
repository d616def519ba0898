/* The threads of smallm.c, which includes this file once: a pool whose threads compute the parts of a task together with the
   thread that calls `share`.

   Parts are claimed from a counter, so a thread that does not run delays nobody, unless it stops in the middle of a part.
   A thread without work waits actively for a few dozen microseconds and then sleeps: on a busy machine nobody waits long for
   a processor that is not free.

   Threads are left out with SMALLM_NO_THREADS, for WebAssembly, and by compilers without atomic operations. */

#if defined(_WIN32) && !defined(SMALLM_NO_THREADS)
#define SMALLM_THREADS 1
typedef volatile LONG counter;
typedef SRWLOCK mutex;
typedef CONDITION_VARIABLE condition;
typedef HANDLE thread;
#define LOAD_COUNTER(n) InterlockedCompareExchange(n, 0, 0)
#define STORE_COUNTER(n, value) InterlockedExchange(n, value)
#define ADD_TO_COUNTER(n, value) (InterlockedExchangeAdd(n, value) + (value))
#define REPLACE_COUNTER(n, old, value) (InterlockedCompareExchange(n, value, old) == (old))
#define PAUSE() YieldProcessor()
#define THREAD_FUNCTION(name, argument) static DWORD WINAPI name(LPVOID argument)
#define START_THREAD(t, function, argument) ((*(t) = CreateThread(NULL, 0, function, argument, 0, NULL)) != NULL)
#define JOIN_THREAD(t) (WaitForSingleObject(t, INFINITE), CloseHandle(t))
#define INIT_LOCK(p) (InitializeSRWLock(&(p)->lock), InitializeConditionVariable(&(p)->changed), true)
#define DESTROY_LOCK(p) ((void)(p))
#define LOCK(p) AcquireSRWLockExclusive(&(p)->lock)
#define UNLOCK(p) ReleaseSRWLockExclusive(&(p)->lock)
#define SLEEP(p) SleepConditionVariableSRW(&(p)->changed, &(p)->lock, INFINITE, 0)
#define WAKE_ALL(p) WakeAllConditionVariable(&(p)->changed)
#define PROCESS_ID() ((long)GetCurrentProcessId())
#elif defined(__GNUC__) && (defined(__unix__) || defined(__APPLE__)) && !defined(__wasm__) && !defined(SMALLM_NO_THREADS)
#define SMALLM_THREADS 1
#include <pthread.h>
#include <unistd.h>
typedef int32_t counter;
typedef pthread_mutex_t mutex;
typedef pthread_cond_t condition;
typedef pthread_t thread;
#define LOAD_COUNTER(n) __atomic_load_n(n, __ATOMIC_SEQ_CST)
#define STORE_COUNTER(n, value) __atomic_store_n(n, value, __ATOMIC_SEQ_CST)
#define ADD_TO_COUNTER(n, value) __atomic_add_fetch(n, value, __ATOMIC_SEQ_CST)
#define REPLACE_COUNTER(n, old, value) \
    __atomic_compare_exchange_n(n, &(int32_t){old}, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)
#if defined(__x86_64__) || defined(__i386__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() ((void)0)
#endif
#define THREAD_FUNCTION(name, argument) static void *name(void *argument)
#define START_THREAD(t, function, argument) (pthread_create(t, NULL, function, argument) == 0)
#define JOIN_THREAD(t) pthread_join(t, NULL)
#define INIT_LOCK(p) (pthread_mutex_init(&(p)->lock, NULL) == 0 && pthread_cond_init(&(p)->changed, NULL) == 0)
#define DESTROY_LOCK(p) (pthread_cond_destroy(&(p)->changed), pthread_mutex_destroy(&(p)->lock))
#define LOCK(p) pthread_mutex_lock(&(p)->lock)
#define UNLOCK(p) pthread_mutex_unlock(&(p)->lock)
#define SLEEP(p) pthread_cond_wait(&(p)->changed, &(p)->lock)
#define WAKE_ALL(p) pthread_cond_broadcast(&(p)->changed)
#define PROCESS_ID() ((long)getpid())
#endif

typedef struct pool pool;

/* Computes one of the parts 0 to parts - 1 of a task. */
typedef void part_function(const void *task, size_t part, size_t parts);

#if SMALLM_THREADS

enum { SPINS = 2000 }; /* 30 to 100 microseconds */

struct pool {
    size_t workers;          /* threads besides the one that calls */
    part_function *function; /* of the current task; NULL ends the threads */
    const void *task;
    size_t parts;
    counter unclaimed, unfinished; /* parts of the current task */
    counter sleepers;        /* threads that sleep, or are about to */
    counter busy;            /* 1 = in use by a pass */
    long process;            /* a process that was forked has none of the threads */
    mutex lock;
    condition changed;
    thread threads[];
};

/* Wakes the threads that sleep until a counter changes, after it has changed. */
static void wake(pool *p)
{
    if (LOAD_COUNTER(&p->sleepers) == 0) return;
    LOCK(p);
    WAKE_ALL(p);
    UNLOCK(p);
}

/* Waits until a counter is 0, or until it is not. */
static void wait_until(pool *p, counter *n, bool zero)
{
    for (int i = 0; i < SPINS; i++) {
        if ((LOAD_COUNTER(n) == 0) == zero) return;
        PAUSE();
    }
    LOCK(p);
    (void)ADD_TO_COUNTER(&p->sleepers, 1); /* first, so that `wake` sees it or this thread sees the change */
    while ((LOAD_COUNTER(n) == 0) != zero) SLEEP(p);
    (void)ADD_TO_COUNTER(&p->sleepers, -1);
    UNLOCK(p);
}

/* Sets a task and its number of parts. */
static void set_task(pool *p, part_function *function, const void *task, size_t parts)
{
    p->function = function, p->task = task, p->parts = parts;
    STORE_COUNTER(&p->unfinished, (int32_t)parts);
    STORE_COUNTER(&p->unclaimed, (int32_t)parts); /* a thread reads the other fields only after it has claimed a part */
    wake(p);
}

/* Claims a part: returns its number, from 1 on, or 0 if all parts are claimed. */
static size_t claim(pool *p)
{
    int32_t left;
    do left = LOAD_COUNTER(&p->unclaimed);
    while (left > 0 && !REPLACE_COUNTER(&p->unclaimed, left, left - 1));
    return (size_t)left;
}

static void compute(pool *p, size_t part)
{
    p->function(p->task, part - 1, p->parts);
    if (ADD_TO_COUNTER(&p->unfinished, -1) == 0) wake(p);
}

THREAD_FUNCTION(work, shared)
{
    pool *p = shared;
    for (;;) {
        size_t part = claim(p);
        if (part == 0) wait_until(p, &p->unclaimed, false);
        else if (p->function == NULL) return 0;
        else compute(p, part);
    }
}

/* Ends the threads. NULL is allowed. */
static void pool_free(pool *p)
{
    if (p == NULL) return;
    if (p->process == PROCESS_ID()) {
        set_task(p, NULL, NULL, p->workers);
        for (size_t i = 0; i < p->workers; i++) JOIN_THREAD(p->threads[i]);
        DESTROY_LOCK(p);
    }
    free(p);
}

/* Starts a pool of this number of threads, one of which is that of the caller; NULL if that fails. */
static pool *pool_new(size_t threads)
{
    pool *p = calloc(1, sizeof *p + threads * sizeof *p->threads);
    if (p == NULL) return NULL;
    p->process = PROCESS_ID();
    if (!INIT_LOCK(p)) {
        free(p);
        return NULL;
    }
    for (; p->workers + 1 < threads; p->workers++)
        if (!START_THREAD(&p->threads[p->workers], work, p)) {
            pool_free(p);
            return NULL;
        }
    return p;
}

/* The pool, for one pass; NULL if another thread uses it: then the pass is computed by one thread. */
static pool *acquire(pool *p)
{
    return p != NULL && p->process == PROCESS_ID() && REPLACE_COUNTER(&p->busy, 0, 1) ? p : NULL;
}

static void release(pool *p)
{
    if (p != NULL) STORE_COUNTER(&p->busy, 0);
}

/* Computes a task, in at most this number of parts; without a pool in a single one. */
static void share(pool *p, part_function *function, const void *task, size_t most)
{
    size_t parts = p == NULL ? 1 : most <= p->workers ? most : p->workers + 1;
    if (parts <= 1) {
        function(task, 0, 1);
        return;
    }
    set_task(p, function, task, parts);
    for (size_t part; (part = claim(p)) > 0;) compute(p, part);
    wait_until(p, &p->unfinished, true);
}

#else

static pool *pool_new(size_t threads) { return (void)threads, NULL; }
static void pool_free(pool *p) { (void)p; }
static pool *acquire(pool *p) { return p; }
static void release(pool *p) { (void)p; }
static void share(pool *p, part_function *function, const void *task, size_t most)
{
    (void)p, (void)most;
    function(task, 0, 1);
}

#endif
