# What user code can't do itself, or would pay too much for: `int3` with the service
# number in EAX. (Some hosts can't deliver `int n` from user code, but every host
# delivers exceptions.) Registers not named are kept. boot/mod.rs has the Rust side.

    .section .boot, "awx", @progbits
    .code64
service:
    cmp $1, %eax
    jb wait_for_interrupt
    je write_uart
    cmp $3, %eax
    jb read_port
    je write_msr
    # 4: a triple fault.
    lidt no_idt_pointer
    ud2

# 0: sleeps, unless irq_total is no longer RDI.
wait_for_interrupt:
    cmp %rdi, irq_total
    jne 1f
    sti
    hlt
1:  iretq

# 1: writes RCX > 0 bytes from RSI to the UART at port EDI, each when the transmitter
# is ready for it, with about a million looks at most for all of them. RCX: bytes
# left over. Changes RAX, RDX, RSI, R8.
write_uart:
    mov $1000000, %r8d
1:  lea 5(%rdi), %edx
2:  in %dx, %al                             # line status: transmitter empty
    test $0x20, %al
    jnz 3f
    dec %r8d
    jnz 2b
    iretq
3:  mov (%rsi), %al
    mov %edi, %edx
    out %al, %dx
    inc %rsi
    dec %rcx
    jnz 1b
    iretq

# 2: reads port EDX 64 times, straight on. Changes RAX.
read_port:
    .rept 64
    in %dx, %al
    .endr
    iretq

# 3: writes EDX:ESI to MSR ECX. Changes RAX.
write_msr:
    mov %esi, %eax
    wrmsr
    iretq
