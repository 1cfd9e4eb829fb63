# What the processor reads: page tables, GDT, TSS, IDT. All of it is finished by the
# assembler, because start-up code may run in an instruction emulator at a
# microsecond an instruction. linker.ld puts boot_start at BASE.

    .set BASE, 0x200000

    .section .boot, "awx", @progbits
    .global boot_start
boot_start:

# 4 GiB one to one in 2 MiB pages, open to user code. 0xe7: present, writable, user,
# accessed, dirty, large page; 0xff: the same without caching, for the devices from
# 3 GiB up. memory/pages.rs maps RAM above 4 GiB.
    .balign 4096
    .global pml4
pml4:
    .quad pdpt + 0x27
    .fill 511, 8, 0

pdpt:
    .quad directories + 0x27
    .quad directories + 0x1027
    .quad directories + 0x2027
    .quad directories + 0x3027
    .fill 508, 8, 0
directories:
    .set page, 0
    .rept 1536
    .quad page + 0xe7
    .set page, page + 0x200000
    .endr
    .rept 512
    .quad page + 0xff
    .set page, page + 0x200000
    .endr

# The selectors are those that Linux uses; some hosts run only these natively.
    .set KERNEL_CODE, 0x10
    .set KERNEL_DATA, 0x18
    .set USER_DATA, 0x2b
    .set USER_CODE, 0x33
    .set TASK, 0x40

    .balign 8
gdt:
    .quad 0
    .quad 0
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0
    .quad 0x00cff3000000ffff
    .quad 0x00affb000000ffff
    .quad 0
    .word 0x2068                            # the whole I/O bitmap and its last byte
    .word (BASE + (tss - boot_start)) & 0xffff
    .byte ((BASE + (tss - boot_start)) >> 16) & 0xff
    .byte 0x89, 0
    .byte ((BASE + (tss - boot_start)) >> 24) & 0xff
    .quad 0
gdt_end:

gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
idt_pointer:
    .word 256 * 16 - 1
    .quad idt
no_idt_pointer:
    .word 0
    .quad 0

    .balign 16
tss:
    .long 0
    .quad kernel_stack_top                  # stack for entries from user code
    .fill 90, 1, 0
    .word 0x68                              # where the I/O bitmap starts
    .fill 8192, 1, 0                        # a zero bit: user code may use the port
    .byte 0xff

    .macro gate address, rights
    .word (BASE + (\address - boot_start)) & 0xffff
    .word KERNEL_CODE
    .byte 0, \rights
    .word (BASE + (\address - boot_start)) >> 16
    .quad 0
    .endm

    .balign 16
idt:
    .set vector, 0
    .rept 3
    gate (entries + 16 * vector), 0x8e
    .set vector, vector + 1
    .endr
    gate service, 0xee                      # 3, open to user code: see services.s
    .set vector, vector + 1
    .rept 251
    gate (entries + 16 * vector), 0x8e
    .set vector, vector + 1
    .endr
    gate spurious, 0x8e                     # 0xff, see start.s
