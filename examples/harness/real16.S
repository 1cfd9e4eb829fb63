# A BIOS image of 64 KiB at 0xf0000. The processor starts in real mode at the reset vector,
# 16 bytes before the end of the image.
#
#   load: @0xf0000    entry: real

        .code16
        .globl start
start:
        mov     %cs, %ax
        mov     %ax, %ds                # the message is in the code segment
        mov     $message, %si
        call    print
        mov     %cs, %dx
        mov     $4, %cx                 # four hexadecimal digits of CS
digit:
        rol     $4, %dx
        mov     %dl, %al
        and     $15, %al
        add     $'0', %al
        cmp     $'9', %al
        jbe     1f
        add     $'a' - '9' - 1, %al
1:      out     %al, $0xf1
        loop    digit
        mov     $newline, %si
        call    print
        xor     %al, %al
        out     %al, $0xf4              # exit port: success
2:      hlt
        jmp     2b

print:                                  # DS:SI, to a zero byte
        lodsb
        test    %al, %al
        jz      3f
        out     %al, $0xf1
        jmp     print
3:      ret

message: .asciz "16 bits: real mode, CS "
newline: .asciz "\n"

        .org    0xfff0
        ljmp    $0xf000, $start
        .org    0x10000
