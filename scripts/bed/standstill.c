/* Preloaded into QEMU: time in the emulated host stands still while the machine under
 * it does.
 *
 * TCG hands the machine's own counters through, so a machine that is paused for two
 * minutes (by its hypervisor, or QEMU by SIGSTOP) makes every deadline inside pass at
 * once: rooms are late that nobody let run. So a thread looks at the clock every TICK, and
 * when nobody could look for GAP, what passed meanwhile is taken off the two sources of
 * all time inside, QEMU's cpu_get_ticks (the TSC) and cpu_get_clock (every timer).
 *
 * QEMU has no option for it. It exports its functions for its modules; if these two
 * are not among them, time inside jumps as it would without this file. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <x86intrin.h>

#include "text.h"

#define TICK_NS 50000000L
#define GAP_NS 1000000000L

/* When they were looked at last; what is taken off them. */
static struct clocks {
	int64_t ns, ticks;
} seen, taken_off;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000L + t.tv_nsec;
}

/* Both clocks move on together; with the lock held. */
static void look(void)
{
	int64_t ns = now_ns(), ticks = __rdtsc();

	if (ns - seen.ns > GAP_NS) {
		taken_off.ns += ns - seen.ns;
		taken_off.ticks += ticks - seen.ticks;
		fprintf(stderr, "kvm-host: stood still for %.1f s\n", (ns - seen.ns) / 1e9);
	}
	seen.ns = ns;
	seen.ticks = ticks;
}

/* Both clocks, without what they stood still for. */
static struct clocks that_ran(void)
{
	struct clocks now;

	pthread_mutex_lock(&lock);
	look();
	now.ns = seen.ns - taken_off.ns;
	now.ticks = seen.ticks - taken_off.ticks;
	pthread_mutex_unlock(&lock);
	return now;
}

static int64_t ticks_that_ran(void) { return that_ran().ticks; }

static int64_t ns_that_ran(void) { return that_ran().ns; }

static void *look_now_and_then(void *unused)
{
	struct timespec tick = { 0, TICK_NS };

	for (;;) {
		nanosleep(&tick, NULL);
		that_ran();
	}
	return unused;
}

/* movabs $to, %rax; jmp *%rax */
static int replace(void *function, int64_t (*by)(void))
{
	unsigned char jump[12] = { 0x48, 0xb8, [10] = 0xff, 0xe0 };

	memcpy(jump + 2, &by, sizeof(by));
	return write_text(function, jump, sizeof(jump));
}

__attribute__((constructor)) static void begin(void)
{
	void *ticks = dlsym(RTLD_DEFAULT, "cpu_get_ticks");
	void *clock = dlsym(RTLD_DEFAULT, "cpu_get_clock");
	sigset_t all, before;
	pthread_t thread;

	unsetenv("LD_PRELOAD");
	if (!ticks || !clock) {
		fprintf(stderr, "kvm-host: this QEMU shows no cpu_get_ticks: its time jumps when the machine stands still\n");
		return;
	}
	/* Both begin at zero, as QEMU's own do. */
	taken_off.ns = seen.ns = now_ns();
	taken_off.ticks = seen.ticks = __rdtsc();
	/* QEMU's signals are for QEMU's threads. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	if (pthread_create(&thread, NULL, look_now_and_then, NULL) == 0 &&
	    (replace(clock, ns_that_ran) || replace(ticks, ticks_that_ran)))
		perror("kvm-host: QEMU's clocks");
	pthread_sigmask(SIG_SETMASK, &before, NULL);
}
