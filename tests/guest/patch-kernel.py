#!/usr/bin/env python3
"""Change a Linux 6.1 source tree so that the kernel also boots on KVM-PVM.

Usage: patch-kernel.py TREE

KVM-PVM runs guest kernel code in KVM's instruction emulator, which lacks some instructions and
takes about a microsecond for each of the others, and user code natively. On ordinary hosts (VT-x,
SVM) the changes make no difference to what the guest does. Every text to be replaced must occur exactly once, else nothing is written.
"""

import pathlib
import sys


class Tree:
    """Edits collected in memory; `save` writes them all."""

    def __init__(self, root):
        self.root = pathlib.Path(root)
        self.texts = {}

    def replace(self, path, old, new):
        text = self.texts.get(path) or (self.root / path).read_text()
        found = text.count(old)
        if found != 1:
            sys.exit(f"patch-kernel: {path}: expected one match, found {found}, of: {old.strip()!r}")
        self.texts[path] = text.replace(old, new)

    def between(self, path, first, last):
        """The text from `first` up to and including the next `last`."""
        text = (self.root / path).read_text()
        start = text.find(first)
        end = text.find(last, start)
        if start < 0 or end < 0:
            sys.exit(f"patch-kernel: {path}: no text from {first.strip()!r} to {last.strip()!r}")
        return text[start : end + len(last)]

    def save(self):
        for path, text in self.texts.items():
            (self.root / path).write_text(text)


def skip_int3_selftest(tree):
    """The emulator has no int3. Nothing else uses it: jump labels, kprobes and the like are off."""
    tree.replace(
        "arch/x86/kernel/alternative.c",
        "\tint3_selftest();\n",
        "\tif (!boot_cpu_has(X86_FEATURE_HYPERVISOR))\n\t\tint3_selftest();\n",
    )


def drop_fwait(tree):
    """The emulator has no fwait, which this function runs at every exec and exit. It only reports
    a pending x87 exception of a state that is thrown away on the next line."""
    tree.replace(
        "arch/x86/kernel/fpu/core.c",
        '\t\tasm volatile("1: fwait\\n"\n\t\t\t     "2:\\n"\n\t\t\t     _ASM_EXTABLE(1b, 2b));\n',
        "",
    )


def serve_syscall_from_page_fault(tree):
    """SYSCALL in native user code jumps to the kernel's entry (LSTAR) but stays in user mode, so
    it arrives as a page fault at that address. RCX and R11 hold what SYSCALL saved. orig_ax = -1
    afterwards: the way out of the fault must not restart the system call a second time."""
    path = "arch/x86/mm/fault.c"
    tree.replace(
        path,
        "#include <asm/vdso.h>",
        "#include <asm/proto.h>\n#include <asm/syscall.h>\n#include <asm/vdso.h>",
    )
    tree.replace(
        path,
        "\tprefetchw(&current->mm->mmap_lock);\n",
        "\tif (user_mode(regs) && regs->ip == (unsigned long)entry_SYSCALL_64) {\n"
        "\t\tregs->ip = regs->cx;\n"
        "\t\tregs->flags = regs->r11 | X86_EFLAGS_IF;\n"
        "\t\tregs->orig_ax = regs->ax;\n"
        "\t\tregs->ax = -ENOSYS;\n"
        "\t\tdo_syscall_64(regs, regs->orig_ax);\n"
        "\t\tregs->orig_ax = -1;\n"
        "\t\treturn;\n"
        "\t}\n\n"
        "\tprefetchw(&current->mm->mmap_lock);\n",
    )


def shrink_memory_sections(tree):
    """32 MiB instead of 128 MiB: fewer page structures to initialise in a small guest whose RAM is
    not a multiple of the section."""
    tree.replace(
        "arch/x86/include/asm/sparsemem.h",
        "# define SECTION_SIZE_BITS\t27",
        "# define SECTION_SIZE_BITS\t25",
    )


def merge_command_line_early(tree):
    """noxsave and clearcpuid= are read while the CPU is identified, which is before the built-in
    command line is joined to the boot loader's."""
    path = "arch/x86/kernel/setup.c"
    last = "\t\tstrscpy(boot_command_line, builtin_cmdline, COMMAND_LINE_SIZE);\n\t}\n#endif\n#endif\n"
    merge = tree.between(path, "#ifdef CONFIG_CMDLINE_BOOL\n#ifdef CONFIG_CMDLINE_OVERRIDE\n", last)
    tree.replace(path, merge, "")
    tree.replace(path, "\tearly_cpu_init();\n", merge + "\tearly_cpu_init();\n")


def slow_ticks(tree):
    """25 timer ticks a second instead of 100, which Kconfig does not offer. An emulated tick takes
    1.5 ms or more."""
    tree.replace("kernel/Kconfig.hz", "\tdefault 100 if HZ_100\n", "\tdefault 25 if HZ_100\n")


def unpad_bss(tree):
    """Data shared with the hypervisor gets 2 MiB of .bss to itself for encrypted guests, which this
    one never is. Clearing the padding takes half a second where each byte is a step."""
    tree.replace(
        "arch/x86/kernel/vmlinux.lds.S",
        "#define BSS_DECRYPTED\t\t\t\t\t\t\\\n\t. = ALIGN(PMD_SIZE);",
        "#define BSS_DECRYPTED\t\t\t\t\t\t\\\n\t. = ALIGN(PAGE_SIZE);",
    )
    tree.replace(
        "arch/x86/kernel/vmlinux.lds.S",
        "\t__start_bss_decrypted_unused = .;\t\t\t\\\n\t. = ALIGN(PMD_SIZE);",
        "\t__start_bss_decrypted_unused = .;\t\t\t\\\n\t. = ALIGN(PAGE_SIZE);",
    )


def keep_empty_entries(tree):
    """Behind the end of RAM the direct map's tables are cleared entry by entry, two searches of the
    memory map for each of a thousand entries. Those that are empty already need none."""
    for entry, mask in (("pte", "PAGE_MASK"), ("pmd", "PMD_MASK"), ("pud", "PUD_MASK")):
        rest = f"!e820__mapped_any(paddr & {mask}, paddr_next,\n\t\t\t\t\t     E820_TYPE_RAM)"
        tree.replace(
            "arch/x86/mm/init_64.c",
            f"if (!after_bootmem &&\n\t\t\t    {rest}",
            f"if (!after_bootmem && !{entry}_none(*{entry}) &&\n\t\t\t    {rest}",
        )


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: patch-kernel.py TREE")
    tree = Tree(sys.argv[1])
    skip_int3_selftest(tree)
    drop_fwait(tree)
    serve_syscall_from_page_fault(tree)
    shrink_memory_sections(tree)
    merge_command_line_early(tree)
    slow_ticks(tree)
    unpad_bss(tree)
    keep_empty_entries(tree)
    tree.save()


if __name__ == "__main__":
    main()
