//! What sealing and opening cost, lease check included. `cargo bench -p ensign-keyvault`.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use ensign_keyvault::testing::TestVault;
use ensign_keyvault::{Holder, PlainBatch};
use ensign_proto::{
    Algorithm, BatchHeader, ClusterId, DekId, Link, NodeId, Offset, Partition, PartitionContext, ProjectId, Rlid, Term,
    TopicId,
};
use ensign_raft::env::{SystemClock, Tasks};

fn context() -> PartitionContext {
    PartitionContext {
        cluster: ClusterId::from_bytes([1; 16]),
        project: ProjectId::from_bytes([2; 16]),
        topic: TopicId::from_bytes([3; 16]),
        partition: Partition(0),
    }
}

fn header() -> BatchHeader {
    BatchHeader {
        algorithm: Algorithm::Aes256Gcm,
        count: 1,
        term: Term(1),
        base_offset: Offset(1),
        first_id: Rlid::new(1, 1),
        last_id: Rlid::new(1, 1),
        dek: DekId::default(),
        prev: Link([0; 32]),
        producers: Vec::new(),
        types: Vec::new(),
        fingerprints: Vec::new(),
    }
}

fn plain(len: usize) -> PlainBatch {
    let mut plain = PlainBatch::with_capacity(len);
    plain.append_with(len, |slot| slot.fill(0x5a)).expect("below the limit");
    plain
}

fn bench(c: &mut Criterion) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime starts");
    let (holder, dek) = runtime.block_on(async {
        let vault = TestVault::new(context().cluster);
        let ring = vault.create_ring(context().project);
        vault.put_custody(NodeId(1), &context());
        let holder: Holder = vault.holder(NodeId(1), Arc::new(SystemClock), &Tasks::new());
        let dek = holder.create_dek(&context(), ring).await.expect("in custody").dek;
        (holder, dek)
    });
    for len in [1 << 10, 16 << 10, 256 << 10] {
        let mut group = c.benchmark_group(format!("{} KiB", len >> 10));
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function("seal", |b| {
            let seal = |plain| holder.seal(&context(), dek, header(), plain);
            b.iter_batched(|| plain(len), seal, BatchSize::LargeInput);
        });
        let sealed = holder.seal(&context(), dek, header(), plain(len)).expect("the lease runs").into_bytes();
        group.bench_function("open", |b| b.iter(|| black_box(holder.open(&context(), &sealed))));
        group.finish();
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
