//! The handle to a vCPU's thread: the command for it, its state, and the kick that makes
//! it look for a new command.
//!
//! A kick cannot be lost. The sender stores the command, then sets `immediate_exit`, then
//! sends a signal. The vCPU's thread clears `immediate_exit`, then looks for a command,
//! then enters KVM_RUN. A command that is stored after the look sets `immediate_exit`
//! after it was cleared, so KVM_RUN returns at once. A command that comes while the guest
//! runs interrupts KVM_RUN by the signal.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU8, Ordering, fence};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::Error;

/// What the thread of a vCPU has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuCommand {
    /// Run the guest.
    Run,
    /// Stop running the guest and wait.
    Park,
    /// Set all registers to their start values, then park. It is carried out even if
    /// another command follows at once.
    Reset,
    /// End the thread.
    Stop,
}

/// What the thread of a vCPU does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuState {
    /// It runs the guest.
    Running,
    /// It waits for a command.
    Parked,
    /// It has ended.
    Stopped,
}

struct CommandState {
    command: VcpuCommand,
    state: VcpuState,
    /// A reset was commanded and has not been carried out.
    reset_due: bool,
}

impl CommandState {
    /// The command to carry out now; `None`: park.
    fn next(&mut self) -> Option<VcpuCommand> {
        match self.command {
            VcpuCommand::Stop => {
                self.state = VcpuState::Stopped;
                Some(VcpuCommand::Stop)
            }
            _ if std::mem::take(&mut self.reset_due) => {
                self.state = VcpuState::Running;
                Some(VcpuCommand::Reset)
            }
            VcpuCommand::Run => {
                self.state = VcpuState::Running;
                Some(VcpuCommand::Run)
            }
            VcpuCommand::Park | VcpuCommand::Reset => None,
        }
    }

    fn is_parked(&self) -> bool {
        match self.state {
            VcpuState::Running => false,
            VcpuState::Parked => !self.reset_due,
            VcpuState::Stopped => true,
        }
    }
}

/// The handle to one vCPU's thread.
pub struct VcpuHandle {
    commands: Mutex<CommandState>,
    changed: Condvar,
    /// The thread has to look at the command before it runs the guest.
    command_pending: AtomicBool,
    /// `kvm_run.immediate_exit`; null once the thread has ended.
    immediate_exit: AtomicPtr<u8>,
    /// Thread ID; 0 before the thread starts and after it has ended.
    thread: AtomicI32,
}

impl VcpuHandle {
    /// A handle to the vCPU whose `kvm_run.immediate_exit` is at the pointer. It is parked.
    pub fn new(immediate_exit: *mut u8) -> Self {
        VcpuHandle {
            commands: Mutex::new(CommandState {
                command: VcpuCommand::Park,
                state: VcpuState::Parked,
                reset_due: false,
            }),
            changed: Condvar::new(),
            command_pending: AtomicBool::new(true),
            immediate_exit: AtomicPtr::new(immediate_exit),
            thread: AtomicI32::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, CommandState> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, commands: MutexGuard<'a, CommandState>) -> MutexGuard<'a, CommandState> {
        self.changed
            .wait(commands)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets or clears `kvm_run.immediate_exit`.
    pub fn set_immediate_exit(&self, value: bool) {
        let pointer = self.immediate_exit.load(Ordering::Relaxed);
        if !pointer.is_null() {
            // SAFETY: the pointer is valid: dropping the `Vcpu`, which owns the mapping,
            // calls `detach_thread` first, and that clears the pointer. Threads other than
            // the vCPU's call this in `send` only, under the lock that `detach_thread` takes.
            // Accesses do not race: the byte is written here alone, always atomically, and
            // read by the kernel. The vCPU's thread also borrows the whole `kvm_run` mutably,
            // because crate kvm-ioctls offers no other access to it, but never uses that
            // borrow for this byte.
            unsafe { AtomicU8::from_ptr(pointer) }.store(value.into(), Ordering::SeqCst);
        }
    }

    // For the vCPU's thread.

    /// The calling thread is the vCPU's from now on.
    pub fn attach_thread(&self) {
        // SAFETY: gettid(2) has no arguments.
        let thread = unsafe { libc::gettid() };
        self.thread.store(thread, Ordering::SeqCst);
    }

    /// The vCPU is about to be dropped, at the end of its thread.
    pub fn detach_thread(&self) {
        let mut commands = self.lock();
        self.immediate_exit
            .store(std::ptr::null_mut(), Ordering::SeqCst);
        self.thread.store(0, Ordering::SeqCst);
        commands.state = VcpuState::Stopped;
        self.changed.notify_all();
    }

    /// Prepares KVM_RUN. True: do not enter it, there is a new command.
    pub fn prepare_entry(&self) -> bool {
        self.set_immediate_exit(false);
        fence(Ordering::SeqCst);
        self.is_command_pending()
    }

    /// Whether there is a new command.
    pub fn is_command_pending(&self) -> bool {
        self.command_pending.load(Ordering::SeqCst)
    }

    /// Parks until there is something else to do. Returns the command to carry out: run,
    /// reset or stop.
    pub fn next_command(&self) -> VcpuCommand {
        let mut commands = self.lock();
        loop {
            if let Some(command) = commands.next() {
                let pending = command != VcpuCommand::Run;
                self.command_pending.store(pending, Ordering::SeqCst);
                self.changed.notify_all();
                return command;
            }
            commands.state = VcpuState::Parked;
            self.changed.notify_all();
            commands = self.wait(commands);
        }
    }

    /// Parks in the middle of an access that waits for its reply. True: continue to wait.
    /// False: give the access up, because a reset or stop is next.
    pub fn park_in_access(&self) -> bool {
        let mut commands = self.lock();
        loop {
            match commands.command {
                VcpuCommand::Stop => return false,
                _ if commands.reset_due => {
                    commands.state = VcpuState::Running;
                    return false;
                }
                VcpuCommand::Run => {
                    commands.state = VcpuState::Running;
                    self.command_pending.store(false, Ordering::SeqCst);
                    return true;
                }
                VcpuCommand::Park | VcpuCommand::Reset => {}
            }
            commands.state = VcpuState::Parked;
            self.changed.notify_all();
            commands = self.wait(commands);
        }
    }

    /// The vCPU has sent an event on which the machine has to decide: it parks itself.
    pub fn park_self(&self) {
        let mut commands = self.lock();
        if commands.command == VcpuCommand::Run {
            commands.command = VcpuCommand::Park;
        }
        self.command_pending.store(true, Ordering::SeqCst);
    }

    // For all other threads.

    /// Stores a command and kicks the vCPU out of the guest. Does not wait.
    pub fn send(&self, command: VcpuCommand) {
        let mut commands = self.lock();
        if command == VcpuCommand::Reset {
            commands.reset_due = true;
            commands.command = VcpuCommand::Park;
        } else {
            commands.command = command;
        }
        self.command_pending.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.set_immediate_exit(true);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: sends a signal that has a handler to a thread of this process. The
            // thread has not ended: it would have cleared its ID under the lock.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, kick_signal()) };
        }
        self.changed.notify_all();
    }

    /// Waits until vCPU number `vcpu` is parked, with no reset due, or has ended.
    ///
    /// # Errors
    /// When that takes longer than `limit`.
    pub fn wait_until_parked(&self, vcpu: usize, limit: Duration) -> Result<(), Error> {
        let deadline = Instant::now() + limit;
        let mut commands = self.lock();
        while !commands.is_parked() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let why = format!("did not park within {limit:?}");
                return Err(Error::Vcpu { vcpu, why });
            }
            commands = self
                .changed
                .wait_timeout(commands, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }

    /// What the vCPU's thread does.
    pub fn state(&self) -> VcpuState {
        self.lock().state
    }
}

/// The signal that interrupts KVM_RUN.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn ignore_signal(_signal: libc::c_int) {}

/// Installs a handler for the signal of the kick that does nothing: the signal has to make
/// KVM_RUN return EINTR, and nothing else.
pub fn install_kick_handler() {
    // SAFETY: an all-zero sigaction is valid; the handler only returns.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = ignore_signal as *const () as usize;
        libc::sigaction(kick_signal(), &action, std::ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    const LIMIT: Duration = Duration::from_secs(10);

    /// A thread that does what the thread of a vCPU does, and sleeps instead of running a
    /// guest.
    fn spawn(handle: &Arc<VcpuHandle>, resets: &Arc<AtomicUsize>) -> std::thread::JoinHandle<()> {
        install_kick_handler();
        let (handle, resets) = (Arc::clone(handle), Arc::clone(resets));
        std::thread::spawn(move || {
            handle.attach_thread();
            loop {
                if handle.prepare_entry() {
                    match handle.next_command() {
                        VcpuCommand::Stop => break,
                        VcpuCommand::Reset => {
                            resets.fetch_add(1, Ordering::SeqCst);
                        }
                        _ => {}
                    }
                    continue;
                }
                // KVM_RUN: checks immediate_exit, then runs until a signal.
                let flag = handle.immediate_exit.load(Ordering::SeqCst);
                // SAFETY: the flag is leaked, so the pointer stays valid.
                if unsafe { AtomicU8::from_ptr(flag) }.load(Ordering::SeqCst) == 0 {
                    std::thread::sleep(Duration::from_micros(50));
                }
            }
            handle.detach_thread();
        })
    }

    fn wait_for(handle: &VcpuHandle, state: VcpuState) {
        let deadline = Instant::now() + LIMIT;
        while handle.state() != state {
            assert!(Instant::now() < deadline, "never became {state:?}");
            std::thread::yield_now();
        }
    }

    #[test]
    fn each_command_leads_to_its_state() {
        let flag = Box::leak(Box::new(0u8));
        let handle = Arc::new(VcpuHandle::new(flag));
        let resets = Arc::new(AtomicUsize::new(0));
        let thread = spawn(&handle, &resets);
        wait_for(&handle, VcpuState::Parked);
        handle.send(VcpuCommand::Run);
        wait_for(&handle, VcpuState::Running);
        handle.send(VcpuCommand::Park);
        handle.wait_until_parked(0, LIMIT).unwrap();
        assert_eq!(handle.state(), VcpuState::Parked);
        handle.send(VcpuCommand::Reset);
        handle.wait_until_parked(0, LIMIT).unwrap();
        assert_eq!(handle.state(), VcpuState::Parked, "it parks afterwards");
        assert_eq!(resets.load(Ordering::SeqCst), 1, "a reset happens once");
        handle.send(VcpuCommand::Run);
        wait_for(&handle, VcpuState::Running);
        handle.send(VcpuCommand::Stop);
        thread.join().unwrap();
        assert_eq!(handle.state(), VcpuState::Stopped);
        // A command to a thread that has ended does no harm.
        handle.send(VcpuCommand::Run);
        handle.wait_until_parked(0, LIMIT).unwrap();
    }

    #[test]
    fn a_reset_is_carried_out_whatever_command_follows() {
        let flag = Box::leak(Box::new(0u8));
        let handle = Arc::new(VcpuHandle::new(flag));
        let resets = Arc::new(AtomicUsize::new(0));
        let thread = spawn(&handle, &resets);
        for round in 1..=500 {
            handle.send(VcpuCommand::Reset);
            handle.send(VcpuCommand::Park);
            handle.send(VcpuCommand::Run);
            handle.send(VcpuCommand::Park);
            handle.wait_until_parked(0, LIMIT).unwrap();
            assert_eq!(resets.load(Ordering::SeqCst), round);
        }
        handle.send(VcpuCommand::Stop);
        thread.join().unwrap();
    }

    #[test]
    fn no_kick_is_lost() {
        let flag = Box::leak(Box::new(0u8));
        let handle = Arc::new(VcpuHandle::new(flag));
        let thread = spawn(&handle, &Arc::default());
        for _ in 0..2000 {
            handle.send(VcpuCommand::Run);
            handle.send(VcpuCommand::Park);
            handle.wait_until_parked(0, LIMIT).unwrap();
        }
        handle.send(VcpuCommand::Stop);
        thread.join().unwrap();
    }

    #[test]
    fn a_vcpu_that_does_not_park_is_named() {
        let flag = Box::leak(Box::new(0u8));
        let handle = VcpuHandle::new(flag);
        handle.lock().state = VcpuState::Running;
        let error = handle
            .wait_until_parked(3, Duration::from_millis(5))
            .unwrap_err();
        assert!(error.to_string().contains("vCPU 3"), "{error}");
    }
}
