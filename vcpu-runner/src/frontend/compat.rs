//! Decides whether a back end can replace another one under a driver that has read and
//! accepted what the first one offered.
//!
//! What the fields of a configuration space mean depends on the device type (virtio 1.2
//! section 5). The fields that bind a driver are listed here, as data, so that a disk can
//! be replaced by a larger one or by one of another make. For a type that is not listed,
//! the whole space must stay the same.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES, virtio_blk_config,
};
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_NET};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MQ, VIRTIO_NET_F_MTU, virtio_net_config};

use crate::pci::virtio::DeviceInfo;

/// How the value of a field may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FieldRule {
    Same,
    NotLess,
    /// 0 means that there is no limit (`size_max` of qemu-storage-daemon).
    NotLessOrZero,
}

/// A field of a configuration space, little-endian.
struct ConfigField {
    name: &'static str,
    /// The field binds the driver only if it accepted this feature.
    feature: Option<u32>,
    offset: usize,
    width: usize,
    rule: FieldRule,
}

/// The field `$name` of the C structure `$config`.
macro_rules! field {
    ($config:ident.$name:ident: $type:ty, $feature:expr, $rule:ident) => {
        ConfigField {
            name: stringify!($name),
            feature: $feature,
            offset: std::mem::offset_of!($config, $name),
            width: size_of::<$type>(),
            rule: FieldRule::$rule,
        }
    };
}

/// Section 5.1.4.
const NET: &[ConfigField] = &[
    field!(virtio_net_config.max_virtqueue_pairs: u16, Some(VIRTIO_NET_F_MQ), NotLess),
    field!(virtio_net_config.mtu: u16, Some(VIRTIO_NET_F_MTU), NotLess),
];

const DISCARD: Option<u32> = Some(VIRTIO_BLK_F_DISCARD);
const WRITE_ZEROES: Option<u32> = Some(VIRTIO_BLK_F_WRITE_ZEROES);

/// Section 5.2.4.
const BLOCK: &[ConfigField] = &[
    field!(virtio_blk_config.capacity: u64, None, NotLess),
    field!(virtio_blk_config.size_max: u32, Some(VIRTIO_BLK_F_SIZE_MAX), NotLessOrZero),
    field!(virtio_blk_config.seg_max: u32, Some(VIRTIO_BLK_F_SEG_MAX), NotLess),
    field!(virtio_blk_config.blk_size: u32, Some(VIRTIO_BLK_F_BLK_SIZE), Same),
    field!(virtio_blk_config.max_discard_sectors: u32, DISCARD, NotLess),
    field!(virtio_blk_config.max_discard_seg: u32, DISCARD, NotLess),
    field!(virtio_blk_config.max_write_zeroes_sectors: u32, WRITE_ZEROES, NotLess),
    field!(virtio_blk_config.max_write_zeroes_seg: u32, WRITE_ZEROES, NotLess),
];

const VIRTIO_CONSOLE_F_MULTIPORT: u32 = 1;

/// Section 5.3.4. The size of a terminal, in the fields before this one, may change.
const CONSOLE: &[ConfigField] = &[ConfigField {
    name: "max_nr_ports",
    feature: Some(VIRTIO_CONSOLE_F_MULTIPORT),
    offset: 4,
    width: 4,
    rule: FieldRule::NotLess,
}];

/// Feature bits of a device type that restrict a driver even if it has not accepted them:
/// VIRTIO_BLK_F_RO (section 5.2.3).
fn restricting_features(virtio_id: u16) -> u64 {
    match virtio_id.into() {
        VIRTIO_ID_BLOCK => 1 << VIRTIO_BLK_F_RO,
        _ => 0,
    }
}

fn config_fields(virtio_id: u16) -> Option<&'static [ConfigField]> {
    match virtio_id.into() {
        VIRTIO_ID_NET => Some(NET),
        VIRTIO_ID_BLOCK => Some(BLOCK),
        VIRTIO_ID_CONSOLE => Some(CONSOLE),
        _ => None,
    }
}

fn field_value(config: &[u8], field: &ConfigField) -> u64 {
    (0..field.width).fold(0, |value, at| {
        let byte = config.get(field.offset + at).copied().unwrap_or(0);
        value | u64::from(byte) << (8 * at)
    })
}

/// Checks whether `new` can replace `seen`, the device as its driver knows it. `accepted`
/// are the feature bits that the driver accepted, once it has set FEATURES_OK.
///
/// # Errors
/// Says what makes the back end incompatible.
pub fn check(seen: &DeviceInfo, accepted: Option<u64>, new: &DeviceInfo) -> Result<(), String> {
    if new.queues < seen.queues {
        return Err(format!(
            "the back end has {} of the {} queues that the guest sees",
            new.queues, seen.queues
        ));
    }
    let Some(accepted) = accepted else {
        return Ok(());
    };
    let missing = accepted & !new.features;
    if missing != 0 {
        return Err(format!(
            "the back end lacks features {missing:#x} that the driver accepted"
        ));
    }
    let restricting = new.features & !accepted & restricting_features(seen.virtio_id);
    if restricting != 0 {
        return Err(format!(
            "the back end has features {restricting:#x} that the driver did not accept"
        ));
    }
    let Some(fields) = config_fields(seen.virtio_id) else {
        return match new.config == seen.config {
            true => Ok(()),
            false => Err(format!(
                "the configuration space differs, and device type {} is not known well enough to \
                 accept that",
                seen.virtio_id
            )),
        };
    };
    for field in fields {
        if field.feature.is_some_and(|bit| accepted & (1 << bit) == 0) {
            continue;
        }
        let (old, now) = (
            field_value(&seen.config, field),
            field_value(&new.config, field),
        );
        let compatible = match field.rule {
            FieldRule::Same => now == old,
            FieldRule::NotLess => now >= old,
            FieldRule::NotLessOrZero => now == 0 || now >= old,
        };
        if !compatible {
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
    fn a_field_may_grow_and_must_not_shrink() {
        let seen = block(100, 126);
        let check_new = |new: &DeviceInfo, accepted| check(&seen, accepted, new);
        let all = Some(seen.features);
        assert_eq!(check_new(&block(100, 126), all), Ok(()));
        assert_eq!(check_new(&block(200, 254), all), Ok(()));
        let smaller = check_new(&block(99, 126), all).unwrap_err();
        assert_eq!(smaller, "its capacity is 99, not 100");
        assert!(
            check_new(&block(100, 10), all)
                .unwrap_err()
                .contains("seg_max is 10")
        );
        // A limit does not bind a driver that did not accept its feature.
        assert_eq!(check_new(&block(100, 10), Some(0)), Ok(()));
        // Nothing binds a driver before FEATURES_OK.
        assert_eq!(check_new(&block(1, 1), None), Ok(()));
    }

    #[test]
    fn zero_means_no_limit() {
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
    fn features_and_queues_that_the_driver_uses_must_stay() {
        let seen = block(100, 126);
        let mut new = block(100, 126);
        new.features &= !4;
        let why = check(&seen, Some(0b101), &new).unwrap_err();
        assert!(why.contains("lacks features 0x4"), "{why}");
        assert_eq!(check(&seen, Some(0b001), &new), Ok(()));
        // Read-only, for a driver that may write.
        new.features |= 1 << 5;
        assert!(check(&seen, Some(0b001), &new).is_err());
        new.queues = 1;
        let why = check(&seen, None, &new).unwrap_err();
        assert!(why.contains("1 of the 2 queues"), "{why}");
    }

    #[test]
    fn nothing_may_change_for_an_unknown_device_type() {
        let mut seen = block(100, 126);
        seen.virtio_id = 26;
        let mut new = seen.clone();
        assert_eq!(check(&seen, Some(0), &new), Ok(()));
        new.config[3] = 1;
        assert!(check(&seen, Some(0), &new).is_err());
    }
}
