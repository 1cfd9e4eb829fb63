//! Whether another process can take a device's place under a driver that has read
//! and accepted what the first one offered.
//!
//! What a configuration space means is its device type's affair (virtio 1.2 section
//! 5). So that a disk can be swapped for a larger one, or for one of another make,
//! the fields that bind a driver are listed here, as data; of a type that is not
//! listed, the whole space must be the same.

use crate::pci::virtio::DeviceInfo;

/// How a field may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    Same,
    NotLess,
    /// 0 is no limit at all (qemu-storage-daemon's size_max).
    NotLessOrNone,
}

/// A field of a configuration space, little-endian.
struct Field {
    name: &'static str,
    /// It counts only if the driver accepted this feature bit.
    feature: Option<u32>,
    offset: usize,
    width: usize,
    rule: Rule,
}

const fn field(
    name: &'static str,
    feature: Option<u32>,
    offset: usize,
    width: usize,
    rule: Rule,
) -> Field {
    Field {
        name,
        feature,
        offset,
        width,
        rule,
    }
}

/// Section 5.1.4.
const NET: &[Field] = &[
    field("max_virtqueue_pairs", Some(22), 8, 2, Rule::NotLess),
    field("mtu", Some(3), 10, 2, Rule::NotLess),
];
/// Section 5.2.4.
const BLOCK: &[Field] = &[
    field("capacity", None, 0, 8, Rule::NotLess),
    field("size_max", Some(1), 8, 4, Rule::NotLessOrNone),
    field("seg_max", Some(2), 12, 4, Rule::NotLess),
    field("blk_size", Some(6), 20, 4, Rule::Same),
    field("max_discard_sectors", Some(13), 36, 4, Rule::NotLess),
    field("max_discard_seg", Some(13), 40, 4, Rule::NotLess),
    field("max_write_zeroes_sectors", Some(14), 48, 4, Rule::NotLess),
    field("max_write_zeroes_seg", Some(14), 52, 4, Rule::NotLess),
];
/// Section 5.3.4: a terminal's size may change.
const CONSOLE: &[Field] = &[field("max_nr_ports", Some(1), 4, 4, Rule::NotLess)];

/// Feature bits of a type that take something away from a driver that has not accepted
/// them: VIRTIO_BLK_F_RO (section 5.2.3).
fn restrictions(virtio_id: u16) -> u64 {
    if virtio_id == 2 { 1 << 5 } else { 0 }
}

fn fields(virtio_id: u16) -> Option<&'static [Field]> {
    match virtio_id {
        1 => Some(NET),
        2 => Some(BLOCK),
        3 => Some(CONSOLE),
        _ => None,
    }
}

fn value(config: &[u8], field: &Field) -> u64 {
    (0..field.width).fold(0, |value, at| {
        let byte = config.get(field.offset + at).copied().unwrap_or(0);
        value | u64::from(byte) << (8 * at)
    })
}

/// Whether `new` can stand in for `seen`, the device as its driver knows it;
/// `accepted` are the feature bits that the driver accepted, if it did so far.
///
/// # Errors
/// What does not suit.
pub fn check(seen: &DeviceInfo, accepted: Option<u64>, new: &DeviceInfo) -> Result<(), String> {
    if new.queues < seen.queues {
        let why = format!(
            "it has {} queues, the guest sees {}",
            new.queues, seen.queues
        );
        return Err(why);
    }
    let Some(accepted) = accepted else {
        return Ok(());
    };
    let missing = accepted & !new.features;
    if missing != 0 {
        return Err(format!(
            "it lacks features {missing:#x} that the driver accepted"
        ));
    }
    let restricted = new.features & !accepted & restrictions(seen.virtio_id);
    if restricted != 0 {
        return Err(format!(
            "it has features {restricted:#x} that the driver did not accept"
        ));
    }
    let Some(fields) = fields(seen.virtio_id) else {
        let same = new.config == seen.config;
        return same
            .then_some(())
            .ok_or_else(|| "its configuration space is another".into());
    };
    for field in fields {
        if field.feature.is_some_and(|bit| accepted & (1 << bit) == 0) {
            continue;
        }
        let (old, now) = (value(&seen.config, field), value(&new.config, field));
        let suits = match field.rule {
            Rule::Same => now == old,
            Rule::NotLess => now >= old,
            Rule::NotLessOrNone => now == 0 || now >= old,
        };
        if !suits {
            return Err(format!("its {} is {now}, not {old}", field.name));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(capacity: u64, seg_max: u32) -> DeviceInfo {
        let mut config = vec![0; 60];
        config[..8].copy_from_slice(&capacity.to_le_bytes());
        config[12..16].copy_from_slice(&seg_max.to_le_bytes());
        config[20..24].copy_from_slice(&512u32.to_le_bytes());
        DeviceInfo {
            id: "disk0".into(),
            virtio_id: 2,
            features: 0b101_0101,
            queues: 2,
            queue_size: 256,
            config,
        }
    }

    #[test]
    fn larger_is_fine_and_smaller_is_not() {
        let seen = block(100, 126);
        let suits = |new: &DeviceInfo, accepted| check(&seen, accepted, new);
        let all = Some(seen.features);
        assert_eq!(suits(&block(100, 126), all), Ok(()));
        assert_eq!(suits(&block(200, 254), all), Ok(()));
        let smaller = suits(&block(99, 126), all).unwrap_err();
        assert_eq!(smaller, "its capacity is 99, not 100");
        assert!(
            suits(&block(100, 10), all)
                .unwrap_err()
                .contains("seg_max is 10")
        );
        // A limit that the driver does not know does not bind it.
        assert_eq!(suits(&block(100, 10), Some(0)), Ok(()));
        // Nor does anything before it has accepted.
        assert_eq!(suits(&block(1, 1), None), Ok(()));
    }

    #[test]
    fn no_limit_is_as_good_as_a_large_one() {
        let mut limited = block(100, 126);
        limited.features |= 1 << 1;
        limited.config[8..12].copy_from_slice(&4096u32.to_le_bytes());
        let mut unlimited = limited.clone();
        unlimited.config[8..12].fill(0);
        let accepted = Some(limited.features);
        assert_eq!(check(&limited, accepted, &unlimited), Ok(()));
        assert_eq!(check(&unlimited, accepted, &limited), Ok(()));
        limited.config[9] += 1;
        let smaller = block(100, 126);
        let mut smaller = DeviceInfo {
            features: limited.features,
            ..smaller
        };
        smaller.config[8..12].copy_from_slice(&512u32.to_le_bytes());
        assert!(check(&limited, accepted, &smaller).is_err());
    }

    #[test]
    fn features_and_queues_must_be_there() {
        let seen = block(100, 126);
        let mut new = block(100, 126);
        new.features &= !4;
        let why = check(&seen, Some(0b101), &new).unwrap_err();
        assert!(why.contains("lacks features 0x4"), "{why}");
        assert_eq!(check(&seen, Some(0b001), &new), Ok(()));
        // Read-only, to a driver that writes.
        new.features |= 1 << 5;
        assert!(check(&seen, Some(0b001), &new).is_err());
        new.queues = 1;
        let why = check(&seen, None, &new).unwrap_err();
        assert!(why.contains("1 queues, the guest sees 2"), "{why}");
    }

    #[test]
    fn of_an_unknown_type_nothing_may_change() {
        let mut seen = block(100, 126);
        seen.virtio_id = 26;
        let mut new = seen.clone();
        assert_eq!(check(&seen, Some(0), &new), Ok(()));
        new.config[3] = 1;
        assert!(check(&seen, Some(0), &new).is_err());
    }
}
