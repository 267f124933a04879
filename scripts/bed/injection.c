/* Preloaded into QEMU: an interrupt that VMRUN injects is delivered once.
 *
 * VMRUN notes the vector as the pending exception before it delivers it, and QEMU leaves
 * it noted. If the vCPU's thread is asked to leave its loop before it notes anything else
 * (the main loop sets a timer's request and then asks; where the thread looks for
 * requests before and for being asked after), the "exception" is delivered too: the
 * interrupt comes a second time, whether interrupts are masked or not. In the first
 * instructions of a kernel's entry that is the end of the guest; in a critical section it
 * may hang.
 *
 * QEMU 7.2 has it (helper_vmrun, SVM_EVTINJ_TYPE_INTR). The note has no reader but the
 * log: the one instruction that makes it is taken out, where it is found byte for byte. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>

#include "text.h"

/* QEMU 7.2.22 of Debian; the note is the third instruction. */
static const unsigned char CODE[] = {
	0x41, 0x0f, 0xb6, 0xf4,                                     /* movzbl %r12b, %esi */
	0x44, 0x89, 0xab, 0x80, 0x33, 0x00, 0x00,                   /* mov %r13d, error_code */
	0x89, 0xb3, 0x54, 0xef, 0xff, 0xff,                         /* mov %esi, exception_index */
	0xc7, 0x83, 0x84, 0x33, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, /* movl $0, exception_is_int */
};
#define NOTE 11

/* A nop of the note's length (APM 3, NOP). */
static const unsigned char NOTHING[] = { 0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00 };

__attribute__((constructor)) static void begin(void)
{
	/* VMRUN's is between two that QEMU exports for its modules. */
	unsigned char *from = dlsym(RTLD_DEFAULT, "cpu_svm_check_intercept_param");
	unsigned char *to = dlsym(RTLD_DEFAULT, "do_vmexit");
	unsigned char *found = from && from < to ? memmem(from, to - from, CODE, sizeof(CODE)) : NULL;

	if (!found || write_text(found + NOTE, NOTHING, sizeof(NOTHING)))
		fprintf(stderr, "kvm-host: this QEMU has another VMRUN: a guest may see an interrupt twice and crash\n");
}
