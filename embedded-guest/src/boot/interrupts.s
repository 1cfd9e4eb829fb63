# One 16-byte entry for every vector. Interrupts are only counted, in irq_counts and
# irq_total; user code looks at the counters. An exception in user code goes on in
# the Rust function `fault`, in user mode.

    .section .boot, "awx", @progbits
    .code64

# An exception for which the processor pushes no error code gets 0.
    .macro exception number, has_code=0
    .balign 16
    .if \has_code == 0
    pushq $0
    .endif
    pushq $\number
    jmp exception
    .endm

    .balign 16
entries:
    .irp number, 0, 1, 2, 3, 4, 5, 6, 7
    exception \number
    .endr
    exception 8, 1
    exception 9
    .irp number, 10, 11, 12, 13, 14
    exception \number, 1
    .endr
    exception 15
    exception 16
    exception 17, 1
    .irp number, 18, 19, 20
    exception \number
    .endr
    exception 21, 1
    .irp number, 22, 23, 24, 25, 26, 27, 28
    exception \number
    .endr
    exception 29, 1
    exception 30, 1
    exception 31

    .set vector, 32
    .rept 224
    .balign 16
    incq irq_counts + 8 * vector
    jmp end_of_interrupt
    .set vector, vector + 1
    .endr

end_of_interrupt:
    incq irq_total
    push %rax
    cmpb $0, x2apic
    je 1f
    push %rcx
    push %rdx
    mov $0x80b, %ecx
    xor %eax, %eax
    xor %edx, %edx
    wrmsr
    pop %rdx
    pop %rcx
    pop %rax
    iretq
1:  mov $0xfee000b0, %eax
    movl $0, (%rax)
    pop %rax
    iretq

# A spurious interrupt gets no end-of-interrupt (SDM 3A, 12.9).
spurious:
    incq irq_counts + 8 * 0xff
    incq irq_total
    iretq

# On the stack: vector, error code, then the interrupt frame.
exception:
    testb $3, 24(%rsp)
    jz kernel_fault
    mov (%rsp), %rdi
    mov 8(%rsp), %rsi
    mov 16(%rsp), %rdx
    mov %cr2, %rcx
    add $16, %rsp
    movq $fault, (%rsp)
    movq $user_stack_top - 8, 24(%rsp)
    iretq

# Start-up code or a service failed: nothing is left to report it with.
kernel_fault:
    mov $0xf4, %edx
    mov $0x7e, %al
    out %al, %dx
    jmp halt

    .section .bss
    .balign 8
    .global irq_counts
irq_counts:
    .fill 256, 8, 0
    .global irq_total
irq_total:
    .quad 0
