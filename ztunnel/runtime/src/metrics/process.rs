//! Descriptors of the process and numbers of its runtimes.

use std::fs;

use super::Registry;
use super::labels::Labels;
use super::text::Samples;
use crate::threads::Workers;

/// Registers `process_open_fds` and `process_max_fds`.
pub fn register_process(registry: &Registry) {
    let labels = Labels::empty();
    registry.on_scrape(move |samples| {
        if let Ok(open) = fs::read_dir("/proc/self/fd") {
            // One of them is the folder being read.
            let open = open.count().saturating_sub(1);
            gauge(
                samples,
                "process_open_fds",
                "Number of open file descriptors",
                &labels,
                open as u64,
            );
        }
        let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
        if let Some(limit) = max_fds(&limits) {
            let help = "Maximum number of file descriptors";
            gauge(samples, "process_max_fds", help, &labels, limit);
        }
    });
}

fn max_fds(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Registers `tokio_*` of the workers.
pub fn register_workers(registry: &Registry, workers: &Workers) {
    let workers = workers.clone();
    let labels: Vec<Labels> =
        (0..workers.len()).map(|index| Labels::new([("worker", &*index.to_string())])).collect();
    let none = Labels::empty();
    registry.on_scrape(move |samples| {
        let numbers = workers.numbers();
        let count = numbers.workers.len() as u64;
        gauge(samples, "tokio_num_workers", "Number of worker threads", &none, count);
        let help = "Tasks alive in the runtimes of the workers";
        gauge(samples, "tokio_num_alive_tasks", help, &none, numbers.alive_tasks);
        let help = "Tasks waiting in the queues fed from other threads";
        gauge(samples, "tokio_global_queue_depth", help, &none, numbers.global_queue_depth);
        for (labels, worker) in labels.iter().zip(numbers.workers) {
            samples.counter(
                "tokio_worker_total_busy_duration_seconds",
                "Time the worker has been busy",
                labels,
                worker.busy.as_secs_f64(),
            );
            let help = "Times the worker has parked";
            samples.counter("tokio_worker_park_count", help, labels, float(worker.parks));
            let help = "Times the worker has parked or unparked";
            let both = float(worker.parks_and_unparks);
            samples.counter("tokio_worker_park_unpark_count", help, labels, both);
        }
    });
}

fn gauge(
    samples: &mut Samples,
    name: &'static str,
    help: &'static str,
    labels: &Labels,
    value: u64,
) {
    samples.gauge(name, help, labels, float(value));
}

/// Exact up to 2^53, which no count here reaches.
#[expect(clippy::cast_precision_loss, reason = "counts here stay far below 2^53")]
const fn float(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_is_the_first_number() {
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax processes  1  2  processes\n\
                      Max open files            1024                 524288               files     \n";
        assert_eq!(max_fds(limits), Some(1024));
        assert_eq!(max_fds(""), None);
        assert_eq!(max_fds("Max open files unlimited unlimited"), None);
    }

    #[test]
    fn a_process_has_descriptors() {
        let registry = Registry::new();
        register_process(&registry);
        let text = registry.render();
        let open = text.lines().find_map(|line| line.strip_prefix("process_open_fds ")).unwrap();
        assert!(open.parse::<u64>().unwrap() >= 3, "{text}");
        assert!(text.contains("process_max_fds "), "{text}");
    }
}
