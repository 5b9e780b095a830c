//! An ext4 file system in a file, whose power can be cut: for tests of real processes, where the machine allows it (root, loop
//! devices, ext4, perl).

use std::error::Error;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use ensign_proto::ByteCount;

type Failure = Box<dyn Error + Send + Sync>;

/// The file system, mounted as long as this lives.
#[derive(Debug)]
pub struct LoopFs {
    image: PathBuf,
    mount: PathBuf,
    mounted: bool,
}

impl LoopFs {
    /// Makes one of `size` bytes in `folder`, and tries whether its power can be cut.
    ///
    /// # Errors
    /// The machine does not allow it.
    pub fn new(folder: &Path, size: ByteCount) -> Result<Self, Failure> {
        let (image, mount) = (folder.join("image"), folder.join("mount"));
        File::create(&image)?.set_len(size.0)?;
        std::fs::create_dir(&mount)?;
        command("mkfs.ext4", &[Path::new("-q"), Path::new("-F"), &image])?;
        let mut fs = Self { image, mount, mounted: false };
        fs.mount()?;
        fs.cut()?;
        fs.restore()?;
        Ok(fs)
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.mount
    }

    /// Cuts the file system off: nothing that was not synced survives, and every later call fails.
    ///
    /// # Errors
    /// The machine does not allow it.
    pub fn cut(&self) -> Result<(), Failure> {
        // EXT4_IOC_SHUTDOWN with EXT4_GOING_FLAGS_NOLOGFLUSH.
        let script =
            "open(my $f, '<', $ARGV[0]) or die $!; my $how = pack('L', 2); ioctl($f, 0x8004587d, $how) or die $!";
        command("perl", &[Path::new("-e"), Path::new(script), &self.mount])
    }

    /// The power comes back. Nobody may have a file open.
    ///
    /// # Errors
    /// Somebody has.
    pub fn restore(&mut self) -> Result<(), Failure> {
        self.unmount()?;
        self.mount()
    }

    fn mount(&mut self) -> Result<(), Failure> {
        command("mount", &[Path::new("-o"), Path::new("loop"), &self.image, &self.mount])?;
        self.mounted = true;
        Ok(())
    }

    fn unmount(&mut self) -> Result<(), Failure> {
        command("umount", &[&self.mount])?;
        self.mounted = false;
        Ok(())
    }
}

impl Drop for LoopFs {
    fn drop(&mut self) {
        if self.mounted {
            let _ = self.unmount();
        }
    }
}

fn command(program: &str, arguments: &[&Path]) -> Result<(), Failure> {
    let output = Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()).into());
    }
    Ok(())
}
