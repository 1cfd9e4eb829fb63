# From the PVH entry point to user mode. The loader enters in 32-bit protected mode,
# paging and interrupts off, EBX = address of hvm_start_info
# (https://xenbits.xen.org/docs/unstable/misc/pvh.html).

    .section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18                          # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

    .section .boot, "awx", @progbits
    .code32
    .global pvh_entry
pvh_entry:
    cli
    cld
    # A command line that begins with "job=first-byte" measures how long it takes
    # to get here: one byte, then power-off.
    mov 24(%ebx), %esi
    test %esi, %esi
    jz set_up
    cmpl $0x3d626f6a, (%esi)                # "job="
    jne set_up
    cmpl $0x73726966, 4(%esi)               # "firs"
    jne set_up
    mov $0x3f8, %edx
    mov $'B', %al
    out %al, %dx
    mov $0x604, %edx                        # PM1a control: SLP_EN, SLP_TYP 0
    mov $0x2000, %eax
    out %ax, %dx
    jmp halt

set_up:
    mov $0xff, %al                          # no interrupts from the old controllers
    out %al, $0x21
    out %al, $0xa1
    lgdt gdt_pointer
    mov $0x620, %eax                        # CR4: PAE, OSFXSR, OSXMMEXCPT
    mov %eax, %cr4
    mov $pml4, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx                   # EFER: LME
    mov $0x100, %eax
    xor %edx, %edx
    wrmsr
    mov $0x80010033, %eax                   # CR0: PG, WP, NE, ET, MP, PE
    mov %eax, %cr0
    ljmp $KERNEL_CODE, $long_mode

    .code64
long_mode:
    mov $KERNEL_DATA, %eax
    mov %eax, %ss
    mov $kernel_stack_top, %esp
    xor %eax, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %fs
    mov %eax, %gs
    lidt idt_pointer
    mov $TASK, %eax
    ltr %ax
    mov %ebx, %edi                          # the argument of user_start

    # The local APIC: on, spurious interrupts on vector 0xff, nothing from LINT0.
    mov $1, %eax
    cpuid
    bt $21, %ecx
    jnc 1f
    movb $1, x2apic
    mov $0x1b, %ecx                         # IA32_APIC_BASE: enabled, x2APIC
    rdmsr
    or $0xc00, %eax
    wrmsr
    mov $0x802, %ecx
    rdmsr
    mov %eax, apic_id
    xor %edx, %edx
    mov $0x808, %ecx                        # task priority
    xor %eax, %eax
    wrmsr
    mov $0x835, %ecx                        # LINT0
    mov $0x10000, %eax
    wrmsr
    mov $0x80f, %ecx                        # spurious vector, enable
    mov $0x1ff, %eax
    wrmsr
    jmp 2f
1:  mov $0xfee00000, %esi
    mov 0x20(%rsi), %eax
    shr $24, %eax
    mov %eax, apic_id
    movl $0, 0x80(%rsi)
    movl $0x10000, 0x350(%rsi)
    movl $0x1ff, 0xf0(%rsi)

2:  pushq $USER_DATA
    pushq $user_stack_top
    pushq $0x202                            # interrupts on
    pushq $USER_CODE
    pushq $user_start
    iretq

# First code in user mode: clear .bss, then Rust.
user_start:
    mov %edi, %r12d
    mov $bss_start, %edi
    mov $bss_end, %ecx
    sub %edi, %ecx
    xor %eax, %eax
    rep stosb
    mov %r12d, %edi
    call guest_main
    ud2

# The end when nothing else ends the machine.
halt:
    hlt
    jmp halt

    .balign 4
    .global apic_id
apic_id:
    .long 0
    .global x2apic
x2apic:
    .byte 0
