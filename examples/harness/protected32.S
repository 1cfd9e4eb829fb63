# Runs in 32-bit protected mode without paging, and prints both bits as CR0 has them.
#
#   load: @0x100000    entry: protected

        .code32
        .globl start
start:
        mov     $message, %esi
        call    print
        mov     %cr0, %eax
        mov     $off, %esi
        test    $1, %al                 # PE
        jz      1f
        mov     $on, %esi
1:      call    print
        mov     $paging, %esi
        call    print
        mov     %cr0, %eax
        mov     $on, %esi
        test    %eax, %eax              # PG is the sign bit
        js      2f
        mov     $off, %esi
2:      call    print
        mov     $newline, %esi
        call    print
        xor     %eax, %eax
        out     %al, $0xf4              # exit port: success
3:      hlt
        jmp     3b

print:                                  # ESI, to a zero byte
        lodsb
        test    %al, %al
        jz      4f
        out     %al, $0xf1
        jmp     print
4:      ret

message: .asciz "32 bits: protection "
paging:  .asciz ", paging "
on:      .asciz "on"
off:     .asciz "off"
newline: .asciz "\n"
