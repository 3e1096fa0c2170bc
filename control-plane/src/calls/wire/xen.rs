//! A guest on Xen, as calls reach it.

use std::io;
use std::os::unix::net::UnixStream;

use vchan::link::Offer;
use xen_glue::calls::CallGuest;

use super::Vchans;

impl Vchans for CallGuest {
    fn domain(&self) -> u16 {
        self.domid().0
    }

    fn control(&mut self) -> io::Result<(UnixStream, Box<dyn Send>)> {
        let (stream, channel) = CallGuest::control(self)?;
        Ok((stream, Box::new(channel)))
    }

    fn publish(&mut self, port: u32, offer: Offer) -> io::Result<()> {
        CallGuest::publish(self, port, offer)
    }

    fn withdraw(&mut self, port: u32) -> io::Result<()> {
        CallGuest::withdraw(self, port)
    }
}
