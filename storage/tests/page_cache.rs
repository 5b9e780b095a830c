//! What the log writes does not stay in the page cache of a real file system.

#![cfg(target_os = "linux")]

use std::fs::File;
use std::io::IoSliceMut;
use std::path::Path;

use ensign_storage::{Disk, FileDisk};
use rustix::io::{Errno, ReadWriteFlags};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

/// Whether the page at `offset` can be read without waiting for the disk.
fn cached(path: &Path, offset: u64) -> bool {
    let mut out = [0; 16];
    let file = File::open(path).expect("it is there");
    match rustix::io::preadv2(&file, &mut [IoSliceMut::new(&mut out)], offset, ReadWriteFlags::NOWAIT) {
        Ok(read) => read > 0,
        Err(Errno::AGAIN) => false,
        Err(error) => panic!("{} is on a file system that cannot say: {error}", path.display()),
    }
}

#[test]
fn the_page_cache_lets_go_of_what_is_on_the_disk_and_keeps_what_will_be_written_again() {
    // Where this was built: the folder for temporary files may be in memory.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("file");
    let file = FileDisk.open(&path).unwrap();
    file.write_zeros(0, 16 * MIB).unwrap();
    file.sync_data().unwrap();
    let page = vec![7; PAGE as usize];

    // Over what was written before, as a log is.
    file.write_at(0, &page[..320]).unwrap();
    for number in 1..(8 * MIB / PAGE) {
        file.write_at(number * PAGE, &page).unwrap();
    }
    assert!(cached(&path, 4 * MIB), "it is written through the cache");
    file.sync_data().unwrap();
    assert!(!cached(&path, PAGE) && !cached(&path, 4 * MIB) && !cached(&path, 8 * MIB - PAGE));
    assert!(cached(&path, 0), "a page of which a part was written is written again with each commit");

    let mut out = vec![0; PAGE as usize];
    file.read_at(4 * MIB, &mut out).unwrap();
    assert_eq!(out, page);
}
