//! Values of options that a launcher and the programs it starts must agree on. Each is an
//! option value on the command line and a string in the VM file.

use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;
use serde::Deserialize;

/// What happens when the guest resets the machine.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OnReset {
    /// The machine boots again
    Reset,
    /// The machine ends with exit code 3
    Exit,
}

/// The format of a disk image.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ImageFormat {
    /// The file holds the disk's contents as they are
    Raw,
    /// QEMU's qcow2, versions 2 and 3
    Qcow2,
    /// QEMU's original qcow, version 1
    Qcow,
}

impl FromStr for ImageFormat {
    type Err = String;

    /// Parses the name of a format as it is stored in an image with a backing file.
    fn from_str(name: &str) -> Result<Self, String> {
        ValueEnum::from_str(name, false)
    }
}

/// Whether the backing file that an image names is opened.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum BackingPolicy {
    /// An image with a backing file is refused
    Deny,
    /// Backing files are opened for reading, wherever they are
    Allow,
}

/// How the writes of a guest reach the medium.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum CacheMode {
    /// Through the host's page cache; a flush writes them to the medium
    #[default]
    Writeback,
    /// Without the page cache (O_DIRECT)
    None,
    /// Through the page cache, and a flush does nothing: a crash of the host may lose data
    Unsafe,
}

macro_rules! display_as_option_value {
    ($($choice:ty),*) => {$(
        impl fmt::Display for $choice {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                // This is `None` only for variants with `#[value(skip)]`.
                self.to_possible_value()
                    .map_or(Ok(()), |value| f.write_str(value.get_name()))
            }
        }
    )*};
}

display_as_option_value!(OnReset, ImageFormat, BackingPolicy, CacheMode);
