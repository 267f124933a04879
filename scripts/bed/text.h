/* Changes to QEMU's code while it runs. */
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static inline int write_text(void *at, const void *bytes, size_t count)
{
	uintptr_t page = sysconf(_SC_PAGESIZE);
	void *first = (void *)((uintptr_t)at & -page);
	size_t size = (uintptr_t)at + count - (uintptr_t)first;

	if (mprotect(first, size, PROT_READ | PROT_WRITE | PROT_EXEC))
		return -1;
	memcpy(at, bytes, count);
	return mprotect(first, size, PROT_READ | PROT_EXEC);
}
