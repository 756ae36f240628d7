use mesh_proto::istio::{security::Authorization, workload::Address};
use mesh_xds::{Handler, Rejected, Update, file};
struct Null(usize);
impl Handler<Address> for Null {
    fn handle(&mut self, u: Vec<Update<Address>>) -> Result<(), Vec<Rejected>> {
        self.0 += u.len();
        Ok(())
    }
}
impl Handler<Authorization> for Null {
    fn handle(&mut self, u: Vec<Update<Authorization>>) -> Result<(), Vec<Rejected>> {
        self.0 += u.len();
        Ok(())
    }
}
fn main() {
    let path = std::env::args().nth(1).unwrap();
    let start = std::time::Instant::now();
    let mut n = Null(0);
    let (l, r) = file::load(&file::Source::Path(path.into()), &mut n).unwrap();
    println!("{:?} {:?} {}", start.elapsed(), r, n.0);
    let s = std::fs::read_to_string("/proc/self/status").unwrap();
    for line in s.lines().filter(|l| l.starts_with("VmHWM") || l.starts_with("VmRSS")) {
        println!("{line}");
    }
    drop(l);
}
