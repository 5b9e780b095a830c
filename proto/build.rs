//! Compiles every `.proto` file under `schema/`, without `protoc`.
//!
//! A new file needs no line here. Two things are decided for all of them: `bytes` fields are `bytes::Bytes`, so that a
//! decoded payload shares the buffer it came in; and services that carry events use our codec with large buffers.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs};

use prost::Message as _;
use prost_build::{Config, Service, ServiceGenerator};
use protox::Compiler;

/// Services whose streams carry events; see `src/codec.rs`.
const BULK_SERVICES: [&str; 3] = ["ensign.v1beta1.Ensign", "ensign.peer.v1.Forward", "ensign.peer.v1.Peer"];

/// Packages that clients may know of, and that reflection therefore serves.
const PUBLIC_PACKAGES: [&str; 4] = ["ensign.v1beta1", "ensign.admin.v1", "mimetype.v1beta1", "region.v1beta1"];

fn main() -> Result<(), Box<dyn Error>> {
    let schema = Path::new("schema");
    println!("cargo::rerun-if-changed=schema");
    println!("cargo::rerun-if-changed=build.rs");

    let mut files = Vec::new();
    collect(schema, &mut files)?;
    files.sort();

    let mut compiler = Compiler::new([schema])?;
    compiler.include_imports(true).include_source_info(true).open_files(&files)?;
    let all = compiler.file_descriptor_set();

    let out = PathBuf::from(env::var("OUT_DIR")?);
    let mut public = all.clone();
    public.file.retain(|file| {
        let package = file.package();
        PUBLIC_PACKAGES.contains(&package) || package == "google.protobuf"
    });
    for file in &mut public.file {
        // Comments are for the generated code; reflection has no use for them.
        file.source_code_info = None;
    }
    fs::write(out.join("public.bin"), public.encode_to_vec())?;

    Config::new()
        .bytes(["."])
        .include_file("tree.rs")
        .service_generator(Box::new(Services {
            bulk: tonic_prost_build::configure().codec_path("crate::codec::BulkCodec").service_generator(),
            plain: tonic_prost_build::configure().service_generator(),
        }))
        .compile_fds(all)?;
    Ok(())
}

/// Chooses a codec for each service.
struct Services {
    bulk: Box<dyn ServiceGenerator>,
    plain: Box<dyn ServiceGenerator>,
}

impl ServiceGenerator for Services {
    fn generate(&mut self, service: Service, buf: &mut String) {
        let name = format!("{}.{}", service.package, service.proto_name);
        if BULK_SERVICES.contains(&name.as_str()) {
            self.bulk.generate(service, buf);
        } else {
            self.plain.generate(service, buf);
        }
    }
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "proto") {
            files.push(path);
        }
    }
    Ok(())
}
