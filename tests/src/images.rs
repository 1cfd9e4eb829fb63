//! Disk images as qemu-img sees them.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn output(arguments: &[&str]) -> Output {
    let output = Command::new("qemu-img").args(arguments).output();
    output.unwrap_or_else(|error| panic!("qemu-img: {error}; ./test.sh installs it"))
}

/// Runs qemu-img; returns its output.
///
/// # Panics
/// It fails.
pub fn qemu_img(arguments: &[&str]) -> String {
    let output = output(arguments);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}{errors}");
    said
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Copies the disk of one image, given by format and path, to another image. An existing
/// target stays the same file.
pub fn convert((from, source): (&str, &Path), (to, target): (&str, &Path)) {
    if target.exists() && to == "raw" {
        let n = ["convert", "-n", "-U", "-f", from, "-O", to];
        qemu_img(&[&n[..], &[text(source), text(target)]].concat());
        return;
    }
    let copy = target.with_extension("new");
    let arguments = ["convert", "-U", "-f", from, "-O", to];
    qemu_img(&[&arguments[..], &[text(source), text(&copy)]].concat());
    // A process that has the target open keeps the same file.
    let copied = std::fs::read(&copy).unwrap();
    std::fs::write(target, copied).unwrap();
    std::fs::remove_file(&copy).unwrap();
}

/// Checks an image's tables. Leaked clusters are no error.
///
/// # Panics
/// Anything else is wrong with them.
pub fn check_format(format: &str, image: &Path) {
    if format != "qcow2" {
        // Other formats have no check.
        return;
    }
    let output = output(&["check", "-q", "-U", "-f", format, text(image)]);
    // 3: leaked clusters.
    let fine = matches!(output.status.code(), Some(0 | 3));
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(fine, "{said}{}", String::from_utf8_lossy(&output.stderr));
}

/// File offset of byte `at` of the disk.
///
/// # Panics
/// It is not allocated.
pub fn place_of(format: &str, image: &Path, at: u64) -> u64 {
    let said = qemu_img(&["map", "-U", "-f", format, "--output=json", text(image)]);
    let extents: Value = serde_json::from_str(&said).unwrap();
    let number = |extent: &Value, key: &str| extent[key].as_u64();
    let found = extents.as_array().unwrap().iter().find_map(|extent| {
        let start = number(extent, "start")?;
        let within = at.checked_sub(start)?;
        (within < number(extent, "length")?).then_some(number(extent, "offset")? + within)
    });
    found.unwrap_or_else(|| panic!("byte {at} of {} lies nowhere: {said}", image.display()))
}
