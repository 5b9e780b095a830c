use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use ensign_proto::ByteCount;

use super::{Crash, Fault, FaultDisk, SECTOR};
use crate::disk::{Disk, DiskFile};

const PATH: &str = "file";

fn open(disk: &FaultDisk) -> Box<dyn DiskFile> {
    disk.open(Path::new(PATH)).unwrap()
}

fn read(disk: &FaultDisk, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    open(disk).read_at(0, &mut out).unwrap();
    out
}

#[test]
fn unsynced_writes_are_lost_and_old_handles_are_dead() {
    let disk = FaultDisk::new();
    let file = open(&disk);
    file.write_at(0, b"kept").unwrap();
    file.sync_data().unwrap();
    file.write_at(0, b"lost").unwrap();
    disk.crash(Crash::DropAll, 0);
    assert_eq!(read(&disk, 4), b"kept");
    assert!(file.write_at(0, b"late").is_err());
    assert_eq!(read(&disk, 4), b"kept");
}

#[test]
fn a_torn_write_keeps_whole_sectors() {
    let disk = FaultDisk::new();
    let seen: BTreeSet<_> = (0..40)
        .map(|seed| {
            let file = open(&disk);
            file.write_at(0, &[1; 2048]).unwrap();
            file.sync_data().unwrap();
            file.write_at(0, &[2; 2048]).unwrap();
            disk.crash(Crash::Sectors, seed);
            let found = read(&disk, 2048);
            assert!(found.chunks(SECTOR).all(|sector| sector.iter().all(|byte| *byte == sector[0])));
            found.iter().step_by(SECTOR).copied().collect::<Vec<_>>()
        })
        .collect();
    assert!(seen.len() > 8, "{seen:?}");
}

#[test]
fn a_failed_sync_loses_its_pages_for_good() {
    let disk = FaultDisk::new();
    let file = open(&disk);
    disk.inject(Fault::Sync(0));
    file.write_at(0, b"data").unwrap();
    assert!(file.sync_data().is_err());
    file.sync_data().unwrap();
    disk.crash(Crash::DropAll, 0);
    assert_eq!(disk.contents(Path::new(PATH)).unwrap(), b"");
}

#[test]
fn a_full_disk_refuses_growth_and_takes_overwrites() {
    let disk = FaultDisk::new();
    let file = open(&disk);
    file.write_at(0, &[0; 100]).unwrap();
    disk.set_capacity(Some(ByteCount(100)));
    assert_eq!(file.write_at(50, &[0; 51]).unwrap_err().kind(), io::ErrorKind::StorageFull);
    file.write_at(50, &[0; 50]).unwrap();
    disk.set_capacity(None);
    file.write_at(50, &[0; 51]).unwrap();
}

#[test]
fn a_full_disk_reserves_a_part_and_keeps_it_until_the_file_is_cut() {
    let disk = FaultDisk::new();
    let file = open(&disk);
    file.write_at(0, &[1; 100]).unwrap();
    disk.set_capacity(Some(ByteCount(300)));
    assert_eq!(file.reserve(100, 1000).unwrap_err().kind(), io::ErrorKind::StorageFull);
    assert_eq!((file.len().unwrap(), disk.allocated()), (300, ByteCount(300)));
    assert_eq!(read(&disk, 300)[100..], [0; 200]);
    file.set_len(100).unwrap();
    assert_eq!(disk.allocated(), ByteCount(100));
    disk.set_capacity(None);
    file.reserve(100, 1000).unwrap();
    assert_eq!((file.len().unwrap(), disk.allocated()), (1000, ByteCount(1000)));
    disk.inject(Fault::Write(0));
    assert_eq!(file.reserve(1000, 3000).unwrap_err().kind(), io::ErrorKind::Other);
    assert_eq!(file.len().unwrap(), 2000);
    assert_eq!(disk.reservations(), (3, 2));
    // Nothing of it was synced.
    disk.crash(Crash::DropAll, 0);
    assert!(open(&disk).is_empty().unwrap());
}

#[test]
fn the_power_fails_at_the_chosen_change() {
    let disk = FaultDisk::new();
    let file = open(&disk);
    disk.inject(Fault::PowerOff(1));
    file.write_at(0, b"a").unwrap();
    assert!(file.sync_data().is_err() && disk.powered_off());
    assert!(disk.open(Path::new(PATH)).is_err());
    disk.crash(Crash::DropAll, 0);
    assert!(open(&disk).is_empty().unwrap());
}
