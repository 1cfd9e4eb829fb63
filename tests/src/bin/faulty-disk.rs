//! device-disk that exits at a fault point: `OUTRIGGER_FAULT=POINT:N` arms the
//! point (`device_vhost_user::fault` has their names) for its Nth time. Without it, it is
//! device-disk.

use std::process::ExitCode;

use device_vhost_user::fault;

fn main() -> ExitCode {
    if let Ok(text) = std::env::var("OUTRIGGER_FAULT") {
        let armed = match text.split_once(':') {
            Some((point, nth)) => nth
                .parse()
                .map_err(|error| format!("{error}"))
                .and_then(|nth| fault::arm(point, nth)),
            None => Err("must be POINT:N".to_owned()),
        };
        if let Err(why) = armed {
            eprintln!("faulty-disk: OUTRIGGER_FAULT={text}: {why}");
            return ExitCode::from(2);
        }
    }
    device_disk::main()
}
