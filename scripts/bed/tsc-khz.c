/* Prints the rate of the time-stamp counter in kHz, measured over half a second.
 * For machines whose kernel log does not tell it: see tsc_khz in scripts/bed/start. */
#include <stdio.h>
#include <time.h>
#include <x86intrin.h>

static double seconds(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC_RAW, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

int main(void)
{
	struct timespec pause = { 0, 500 * 1000 * 1000 };
	double began = seconds();
	unsigned long long ticks = __rdtsc();

	nanosleep(&pause, NULL);
	ticks = __rdtsc() - ticks;
	printf("%.0f\n", ticks / (seconds() - began) / 1000);
	return 0;
}
