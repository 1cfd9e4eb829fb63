//! What every device process must do, whatever the device: the contract of vhost-user and of
//! this project, tested with real processes. [`subject`] describes the devices; each of the
//! other modules tests one side of the contract.

mod handshake;
mod hostile;
mod memory;
mod process;
mod requirements;
mod rings;
mod subject;

/// The contract for one device.
macro_rules! contract {
    ($($device:ident: $subject:ty,)*) => {$(
        mod $device {
            contract! { @modules $subject;
                handshake {
                    offers_what_every_device_offers
                    reports_its_number_of_queues
                    refuses_features_that_it_did_not_offer
                    pads_and_bounds_its_configuration_space
                    refuses_writes_to_its_configuration_space
                    serves_one_front_end_after_the_other
                    survives_a_disconnect_within_a_message
                }
                memory {
                    accepts_memory_regions_one_by_one
                    continues_while_memory_is_replaced
                    continues_while_regions_are_added_and_removed
                    returns_requests_in_a_removed_region
                    refuses_invalid_regions
                }
                rings {
                    are_enabled_from_the_start_without_protocol_features
                    may_be_enabled_before_the_features_are_set
                    stay_enabled_when_features_are_set_again
                    keep_their_state_when_the_doorbell_is_replaced
                    do_not_lose_a_kick_from_before_the_start
                    have_stopped_when_get_vring_base_is_answered
                    resume_where_they_stopped_and_lose_nothing
                    can_be_reset_with_requests_in_flight
                    have_stopped_when_the_socket_is_closed
                    are_silent_and_answer_while_stopped
                    interrupt_only_when_asked
                    do_not_lose_an_interrupt
                    take_indirect_descriptors
                    have_up_to_1024_entries
                    wrap_around
                    work_without_event_idx
                }
                hostile {
                    queue_that_does_not_exist
                    invalid_ring_size
                    second_queue_without_multi_queue
                    rings_outside_memory
                    malformed_chain
                    buffer_outside_memory
                    does_not_fill_the_log
                    available_index_that_jumps
                    head_out_of_range
                    malformed_message
                    endless_descriptor_chain
                    random_descriptors
                }
                requirements {
                    r2_7_5_3_2_direct_descriptors_before_an_indirect_table
                    r2_7_5_3_2_the_write_flag_of_an_indirect_table_is_ignored
                    r2_7_8_2_used_length_is_what_was_written
                    r2_7_10_2_doorbells_without_buffers_are_harmless
                }
                process {
                    is_sandboxed
                    ends_at_once_on_sigterm
                    ends_on_sigterm_under_load
                    leaves_sigint_to_a_launcher_that_ignores_it
                    ends_with_the_front_end_of_a_connected_socket
                    sleeps_when_there_is_nothing_to_do
                    prints_its_capabilities
                    refuses_contradictory_options
                }
            }
        }
    )*};
    (@modules $subject:ty; $($module:ident { $($test:ident)* })*) => {$(
        mod $module {
            use crate::subject::*;
            $(#[test] fn $test() { crate::$module::$test::<$subject>() })*
        }
    )*};
}

contract! {
    disk: Disk<1>,
    disk_with_queues: Disk<4>,
    net: Net,
    console: Console,
}
