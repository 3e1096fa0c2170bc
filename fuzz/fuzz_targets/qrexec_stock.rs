#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz_harness::qrexec_stock::channel(data));
