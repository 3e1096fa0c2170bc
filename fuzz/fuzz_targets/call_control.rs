#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz_harness::calls::call_control(data));
