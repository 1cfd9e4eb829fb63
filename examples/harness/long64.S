# Runs in 64-bit long mode and prints a register that exists only in this mode.
#
#   load: @0x100000    entry: long

        .code64
        .globl start
start:
        lea     message(%rip), %rsi
        call    print
        mov     $0x0123456789abcdef, %r8
        mov     $16, %ecx               # digits
digit:
        rol     $4, %r8
        mov     %r8b, %al
        and     $15, %al
        add     $'0', %al
        cmp     $'9', %al
        jbe     1f
        add     $'a' - '9' - 1, %al
1:      out     %al, $0xf1
        dec     %ecx
        jnz     digit
        lea     newline(%rip), %rsi
        call    print
        xor     %eax, %eax
        out     %al, $0xf4              # exit port: success
2:      hlt
        jmp     2b

print:                                  # RSI, to a zero byte
        lodsb
        test    %al, %al
        jz      3f
        out     %al, $0xf1
        jmp     print
3:      ret

message: .asciz "64 bits: R8 "
newline: .asciz "\n"
