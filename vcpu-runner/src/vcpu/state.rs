//! Who runs and who stands still: the orders to a vCPU's thread and the kick
//! that makes it look at them.
//!
//! The kick cannot be lost. The kicker first leaves its order, then sets
//! `immediate_exit`, then sends a signal. The vCPU's thread clears
//! `immediate_exit`, then looks for orders, then enters KVM_RUN. An order that
//! comes after the look finds `immediate_exit` cleared already and sets it again,
//! so KVM_RUN returns at once; one that comes while KVM_RUN runs interrupts it by
//! the signal.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU8, Ordering, fence};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::Error;

/// What a vCPU's thread shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Run the guest.
    Run,
    /// Stand still.
    Park,
    /// Set all registers to their start values, then stand still. Owed until it
    /// is done, whatever is ordered meanwhile.
    Reset,
    /// End.
    Stop,
}

/// What a vCPU's thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It runs the guest.
    Running,
    /// It stands still.
    Parked,
    /// It has ended.
    Stopped,
}

struct Inner {
    order: Order,
    state: State,
    reset_owed: bool,
}

impl Inner {
    /// What the thread does next under its orders; `None` waits.
    fn next(&mut self) -> Option<Order> {
        match self.order {
            Order::Stop => {
                self.state = State::Stopped;
                Some(Order::Stop)
            }
            _ if std::mem::take(&mut self.reset_owed) => {
                self.state = State::Running;
                Some(Order::Reset)
            }
            Order::Run => {
                self.state = State::Running;
                Some(Order::Run)
            }
            Order::Park | Order::Reset => None,
        }
    }

    fn is_still(&self) -> bool {
        match self.state {
            State::Running => false,
            State::Parked => !self.reset_owed,
            State::Stopped => true,
        }
    }
}

/// The switch of one vCPU.
pub struct Control {
    inner: Mutex<Inner>,
    changed: Condvar,
    attention: AtomicBool,
    immediate_exit: AtomicPtr<u8>,
    thread: AtomicI32,
}

impl Control {
    /// A switch for the vCPU whose `kvm_run.immediate_exit` is at the pointer;
    /// the order is to stand still.
    pub fn new(immediate_exit: *mut u8) -> Self {
        Control {
            inner: Mutex::new(Inner {
                order: Order::Park,
                state: State::Parked,
                reset_owed: false,
            }),
            changed: Condvar::new(),
            attention: AtomicBool::new(true),
            immediate_exit: AtomicPtr::new(immediate_exit),
            thread: AtomicI32::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_immediate_exit(&self, value: u8) {
        let pointer = self.immediate_exit.load(Ordering::Relaxed);
        if !pointer.is_null() {
            // SAFETY: the run area is mapped for as long as the vCPU's thread
            // lives, which clears the pointer when it ends; the byte is only ever
            // accessed atomically by us and read by the kernel.
            unsafe { AtomicU8::from_ptr(pointer) }.store(value, Ordering::SeqCst);
        }
    }

    // The vCPU's thread --------------------------------------------------------

    /// The calling thread is the vCPU's.
    pub fn enter_thread(&self) {
        // SAFETY: gettid(2) has no arguments.
        let thread = unsafe { libc::gettid() };
        self.thread.store(thread, Ordering::SeqCst);
    }

    /// The calling thread, the vCPU's, ends.
    pub fn leave_thread(&self) {
        let mut inner = self.lock();
        self.immediate_exit
            .store(std::ptr::null_mut(), Ordering::SeqCst);
        self.thread.store(0, Ordering::SeqCst);
        inner.state = State::Stopped;
        self.changed.notify_all();
    }

    /// Before KVM_RUN: whether there is an order to look at.
    pub fn wants_attention(&self) -> bool {
        self.set_immediate_exit(0);
        fence(Ordering::SeqCst);
        self.attention.load(Ordering::SeqCst)
    }

    /// Whether there is an order to look at, for a wait outside KVM_RUN.
    pub fn is_interrupted(&self) -> bool {
        self.attention.load(Ordering::SeqCst)
    }

    /// Stands still for as long as the orders say so; returns the one that is to
    /// be carried out now: run, reset or stop.
    pub fn park(&self) -> Order {
        let mut inner = self.lock();
        loop {
            if let Some(order) = inner.next() {
                self.attention.store(order != Order::Run, Ordering::SeqCst);
                self.changed.notify_all();
                return order;
            }
            inner.state = State::Parked;
            self.changed.notify_all();
            inner = self
                .changed
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Stands still in the middle of an access that waits for its answer. True:
    /// go on waiting. False: give up, an order to end or to reset is next.
    pub fn hold(&self) -> bool {
        let mut inner = self.lock();
        loop {
            match inner.order {
                Order::Stop => return false,
                _ if inner.reset_owed => {
                    inner.state = State::Running;
                    return false;
                }
                Order::Run => {
                    inner.state = State::Running;
                    self.attention.store(false, Ordering::SeqCst);
                    return true;
                }
                Order::Park | Order::Reset => {}
            }
            inner.state = State::Parked;
            self.changed.notify_all();
            inner = self
                .changed
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The vCPU orders itself to stand still: it has reported something that
    /// others must decide on.
    pub fn halt(&self) {
        let mut inner = self.lock();
        if inner.order == Order::Run {
            inner.order = Order::Park;
        }
        self.attention.store(true, Ordering::SeqCst);
    }

    // Everybody else -----------------------------------------------------------

    /// Gives an order; does not wait. Kicks the vCPU out of the guest.
    pub fn order(&self, order: Order) {
        let mut inner = self.lock();
        if order == Order::Reset {
            inner.reset_owed = true;
            inner.order = Order::Park;
        } else {
            inner.order = order;
        }
        self.attention.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.set_immediate_exit(1);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: sends a signal that has a handler to a thread of this
            // process; under the lock, so that the thread has not ended.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, kick_signal()) };
        }
        self.changed.notify_all();
    }

    /// Waits until the vCPU stands still, with no reset owed, or has ended.
    ///
    /// # Errors
    /// When that takes longer than `limit`.
    pub fn wait_still(&self, vcpu: usize, limit: Duration) -> Result<(), Error> {
        let deadline = Instant::now() + limit;
        let mut inner = self.lock();
        while !inner.is_still() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let why = format!("did not stand still within {limit:?}");
                return Err(Error::Vcpu { vcpu, why });
            }
            inner = self
                .changed
                .wait_timeout(inner, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }

    /// What the vCPU's thread does.
    pub fn state(&self) -> State {
        self.lock().state
    }
}

/// The signal that interrupts KVM_RUN.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn do_nothing(_signal: libc::c_int) {}

/// Gives the kick's signal a handler that does nothing: all that it is for is
/// EINTR.
pub fn install_kick_handler() {
    // SAFETY: an all-zero sigaction is valid; the handler only returns.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = do_nothing as *const () as usize;
        libc::sigaction(kick_signal(), &action, std::ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    const LIMIT: Duration = Duration::from_secs(10);

    /// A thread that behaves as a vCPU does, with a sleep in place of the guest.
    fn spawn(control: &Arc<Control>, resets: &Arc<AtomicUsize>) -> std::thread::JoinHandle<()> {
        install_kick_handler();
        let (control, resets) = (Arc::clone(control), Arc::clone(resets));
        std::thread::spawn(move || {
            control.enter_thread();
            loop {
                if control.wants_attention() {
                    match control.park() {
                        Order::Stop => break,
                        Order::Reset => {
                            resets.fetch_add(1, Ordering::SeqCst);
                        }
                        _ => {}
                    }
                    continue;
                }
                // Sleeps until a signal; looks at immediate_exit as KVM does.
                let flag = control.immediate_exit.load(Ordering::SeqCst);
                // SAFETY: the flag is leaked, so it is there for ever.
                if unsafe { AtomicU8::from_ptr(flag) }.load(Ordering::SeqCst) == 0 {
                    std::thread::sleep(Duration::from_micros(50));
                }
            }
            control.leave_thread();
        })
    }

    fn wait_for(control: &Control, state: State) {
        let deadline = Instant::now() + LIMIT;
        while control.state() != state {
            assert!(Instant::now() < deadline, "never became {state:?}");
            std::thread::yield_now();
        }
    }

    #[test]
    fn every_transition() {
        let flag = Box::leak(Box::new(0u8));
        let control = Arc::new(Control::new(flag));
        let resets = Arc::new(AtomicUsize::new(0));
        let thread = spawn(&control, &resets);
        wait_for(&control, State::Parked);
        control.order(Order::Run);
        wait_for(&control, State::Running);
        control.order(Order::Park);
        control.wait_still(0, LIMIT).unwrap();
        assert_eq!(control.state(), State::Parked);
        control.order(Order::Reset);
        control.wait_still(0, LIMIT).unwrap();
        assert_eq!(control.state(), State::Parked, "it stands still afterwards");
        assert_eq!(resets.load(Ordering::SeqCst), 1, "a reset happens once");
        control.order(Order::Run);
        wait_for(&control, State::Running);
        control.order(Order::Stop);
        thread.join().unwrap();
        assert_eq!(control.state(), State::Stopped);
        // Orders to one that has ended are harmless.
        control.order(Order::Run);
        control.wait_still(0, LIMIT).unwrap();
    }

    #[test]
    fn no_reset_is_lost_whatever_comes_after_it() {
        let flag = Box::leak(Box::new(0u8));
        let control = Arc::new(Control::new(flag));
        let resets = Arc::new(AtomicUsize::new(0));
        let thread = spawn(&control, &resets);
        for round in 1..=500 {
            control.order(Order::Reset);
            control.order(Order::Park);
            control.order(Order::Run);
            control.order(Order::Park);
            control.wait_still(0, LIMIT).unwrap();
            assert_eq!(resets.load(Ordering::SeqCst), round);
        }
        control.order(Order::Stop);
        thread.join().unwrap();
    }

    #[test]
    fn no_kick_is_lost() {
        let flag = Box::leak(Box::new(0u8));
        let control = Arc::new(Control::new(flag));
        let thread = spawn(&control, &Arc::default());
        for _ in 0..2000 {
            control.order(Order::Run);
            control.order(Order::Park);
            control.wait_still(0, LIMIT).unwrap();
        }
        control.order(Order::Stop);
        thread.join().unwrap();
    }

    #[test]
    fn whoever_does_not_stand_still_is_named() {
        let flag = Box::leak(Box::new(0u8));
        let control = Control::new(flag);
        control.lock().state = State::Running;
        let error = control.wait_still(3, Duration::from_millis(5)).unwrap_err();
        assert!(error.to_string().contains("vCPU 3"), "{error}");
    }
}
