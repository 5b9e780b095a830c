//! The published API, field by field. A change in this snapshot breaks clients, unless it adds a number from 1001 on.
//!
//! `tests/pyensign/wire_compat.py` compares the same descriptors with those inside the official client.

use std::fmt::Write as _;

use ensign_proto::FILE_DESCRIPTOR_SET;
use ensign_proto::pb::ensign::v1beta1::{Compression, Event, EventWrapper, parameter};
use ensign_proto::pb::mimetype::v1beta1::Mime;
use ensign_proto::pb::region::v1beta1::Region;
use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet};

fn descriptors() -> FileDescriptorSet {
    FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).expect("the build wrote them")
}

fn describe(package: &str) -> String {
    let mut text = String::new();
    for file in descriptors().file.iter().filter(|file| file.package() == package) {
        let _ = writeln!(text, "{}", file.name());
        for service in &file.service {
            for rpc in &service.method {
                let stream = |streams| if streams { "stream " } else { "" };
                let _ = writeln!(
                    text,
                    "  rpc /{package}.{}/{} {}{} -> {}{}",
                    service.name(),
                    rpc.name(),
                    stream(rpc.client_streaming()),
                    rpc.input_type(),
                    stream(rpc.server_streaming()),
                    rpc.output_type()
                );
            }
        }
        for message in &file.message_type {
            describe_message(&mut text, "  ", message);
        }
        for item in &file.enum_type {
            describe_enum(&mut text, "  ", item);
        }
    }
    text
}

fn describe_message(text: &mut String, indent: &str, message: &DescriptorProto) {
    let _ = writeln!(text, "{indent}message {}", message.name());
    let deeper = format!("{indent}  ");
    for field in &message.field {
        let oneof = field.oneof_index.map(|index| message.oneof_decl[index as usize].name());
        let oneof = oneof.map(|name| format!(" in {name}")).unwrap_or_default();
        let _ = writeln!(text, "{deeper}{} {}: {}{oneof}", field.number(), field.name(), type_of(field));
    }
    for nested in &message.nested_type {
        describe_message(text, &deeper, nested);
    }
    for item in &message.enum_type {
        describe_enum(text, &deeper, item);
    }
}

fn type_of(field: &FieldDescriptorProto) -> String {
    let repeated = if field.label() == Label::Repeated { "repeated " } else { "" };
    match field.r#type() {
        Type::Message | Type::Enum => format!("{repeated}{}", field.type_name()),
        scalar => format!("{repeated}{}", scalar.as_str_name().trim_start_matches("TYPE_").to_lowercase()),
    }
}

fn describe_enum(text: &mut String, indent: &str, item: &EnumDescriptorProto) {
    let values: Vec<_> = item.value.iter().map(|value| format!("{}={}", value.name(), value.number())).collect();
    let _ = writeln!(text, "{indent}enum {} {{ {} }}", item.name(), values.join(" "));
}

#[test]
fn the_event_api_is_the_published_one() {
    insta::assert_snapshot!(describe("ensign.v1beta1"));
}

#[test]
fn formats_and_regions_have_the_published_numbers() {
    insta::assert_snapshot!([describe("mimetype.v1beta1"), describe("region.v1beta1")].concat());
}

fn sorted<const N: usize>(mut names: [&str; N]) -> Vec<&str> {
    names.sort_unstable();
    names.to_vec()
}

#[test]
fn our_own_fields_are_numbered_from_1001() {
    let ours = [
        "Ack.offset",
        "EventWrapper.producer_session",
        "EventWrapper.producer_epoch",
        "EventWrapper.producer_sequence",
        "InfoRequest.consistency",
        "OpenStream.producer_session",
        "OpenStream.producer_epoch",
        "Query.consistency",
        "Query.message_bytes_max",
        "StreamReady.next_offsets",
        "Subscription.offset",
        "Subscription.time",
        "Subscription.after_event",
        "Subscription.earliest",
        "Subscription.message_bytes_max",
        "Subscription.consistency",
        "Topic.replication",
        "Topic.regions",
        "Topic.leader_region",
    ];
    let mut found = Vec::new();
    for file in descriptors().file.iter().filter(|file| file.package() == "ensign.v1beta1") {
        for message in &file.message_type {
            let own = message.field.iter().filter(|field| field.number() > 1000);
            found.extend(own.map(|field| format!("{}.{}", message.name(), field.name())));
        }
    }
    found.sort();
    assert_eq!(found, sorted(ours), "docs/format.md lists them too");
}

#[test]
fn an_alias_is_the_number_of_the_first_name() {
    assert_eq!(Mime::from_str_name("UNSPECIFIED").map(i32::from), Some(0));
    assert_eq!(Mime::ApplicationJson as i32, 50);
    assert_eq!(Region::GcpEuropeWest12a as i32, 2_380_150);
    assert_eq!(Compression::default().algorithm, 0);
}

#[test]
fn a_number_nobody_knows_survives() {
    let event = Event { mimetype: 31_337, ..Event::default() };
    assert_eq!(Event::decode(event.encode_to_vec().as_slice()).unwrap().mimetype, 31_337);
}

#[test]
fn an_integer_parameter_is_zig_zag() {
    let value =
        ensign_proto::pb::ensign::v1beta1::Parameter { value: Some(parameter::Value::I(-1)), name: String::new() };
    assert_eq!(value.encode_to_vec(), [0x08, 0x01]);
}

#[test]
fn a_payload_shares_the_buffer_it_came_in() {
    let wrapper = EventWrapper { event: vec![7; 1024].into(), ..EventWrapper::default() };
    let buffer = bytes::Bytes::from(wrapper.encode_to_vec());
    let decoded = EventWrapper::decode(buffer.clone()).unwrap();
    let (start, end) = (buffer.as_ptr() as usize, buffer.as_ptr() as usize + buffer.len());
    assert!((start..end).contains(&(decoded.event.as_ptr() as usize)));
}

#[test]
fn malformed_messages_are_refused() {
    for bytes in [&[0x0a, 0xff][..], &[0x0a, 0x05, 1, 2], &[0xff; 11], &[0x0b], &[0x10, 0x80]] {
        assert!(EventWrapper::decode(bytes).is_err(), "{bytes:?}");
    }
}
