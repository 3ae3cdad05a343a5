//! A report as pictures: what each case costs, and how that grows with pods, nodes and flows.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, anyhow};
use plotters::{
    coord::ranged1d::SegmentValue,
    prelude::{
        ChartBuilder, Color, Histogram, IntoDrawingArea, IntoLogRange, IntoSegmentedCoord, LineSeries,
        Palette, Palette99, PathElement, SVGBackend, SeriesLabelPosition, ShapeStyle, WHITE,
    },
};

use super::report::{Case, Report};

const FONT: &str = "sans-serif";

/// One of the numbers that a case is measured for.
struct Axis {
    /// Name of the file.
    file: &'static str,
    title: &'static str,
    value: fn(&Case) -> u32,
    /// What stays the same along a line.
    others: fn(&Case) -> (u32, u32, u32),
}

const AXES: [Axis; 3] = [
    Axis {
        file: "pods.svg",
        title: "pods",
        value: |case| case.pods,
        others: |case| (case.nodes, case.flows, case.frame_bytes),
    },
    Axis {
        file: "nodes.svg",
        title: "nodes",
        value: |case| case.nodes,
        others: |case| (case.pods, case.flows, case.frame_bytes),
    },
    Axis {
        file: "flows.svg",
        title: "flows",
        value: |case| case.flows,
        others: |case| (case.pods, case.nodes, case.frame_bytes),
    },
];

/// Draws the pictures into `directory`, which is made if need be; their paths.
pub fn draw(directory: &Path, report: &Report) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let mut paths = Vec::new();
    for kind in ["program", "live"] {
        let cases: Vec<&Case> = smallest(report.cases.iter().filter(|case| case.name.starts_with(kind)));
        if !cases.is_empty() {
            let path = directory.join(format!("{kind}.svg"));
            costs(&path, &format!("{kind}: nanoseconds a packet, one flow"), &cases)
                .map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))?;
            paths.push(path);
        }
    }
    for axis in &AXES {
        let lines = lines(axis, &report.cases);
        if !lines.is_empty() {
            let path = directory.join(axis.file);
            growth(&path, axis, &lines)
                .map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))?;
            paths.push(path);
        }
    }
    Ok(paths)
}

/// Of every case the row with the fewest flows, nodes and pods; of live frames, one of each length.
fn smallest<'a>(cases: impl Iterator<Item = &'a Case>) -> Vec<&'a Case> {
    let mut found: Vec<&Case> = Vec::new();
    for case in cases {
        let size = |case: &Case| (case.flows, case.nodes, case.pods);
        match found
            .iter_mut()
            .find(|other| (&other.name, other.frame_bytes) == (&case.name, case.frame_bytes))
        {
            Some(other) if size(case) < size(other) => *other = case,
            Some(_) => {}
            None => found.push(case),
        }
    }
    found
}

type Drawn = Result<(), Box<dyn std::error::Error>>;

fn costs(path: &Path, title: &str, cases: &[&Case]) -> Drawn {
    let count = cases.len();
    let height = 90 + 22 * u32::try_from(count)?;
    let root = SVGBackend::new(path, (900, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let most = cases.iter().map(|case| case.ns_median).fold(1.0, f64::max);
    // From top to bottom.
    let at = |row: usize| cases.get(count - 1 - row);
    let mut chart = ChartBuilder::on(&root)
        .caption(title, (FONT, 18))
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(260)
        .build_cartesian_2d(0.0..most * 1.05, (0..count - 1).into_segmented())?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(count)
        .y_label_formatter(&|value| match value {
            SegmentValue::CenterOf(row) | SegmentValue::Exact(row) => at(*row)
                .map(|case| format!("{} ({} B): {:.1}", case.name, case.frame_bytes, case.ns_median))
                .unwrap_or_default(),
            SegmentValue::Last => String::new(),
        })
        .draw()?;
    let bars = (0..count).filter_map(|row| at(row).map(|case| (row, case.ns_median)));
    chart
        .draw_series(Histogram::horizontal(&chart).style(Palette99::pick(0).filled()).margin(3).data(bars))?;
    root.present()?;
    Ok(())
}

/// A name, and its points.
type Line = (String, Vec<(f64, f64)>);

/// The cases that were measured for more than one value of the axis while all else was the same.
fn lines(axis: &Axis, cases: &[Case]) -> Vec<Line> {
    let groups: BTreeSet<_> = cases.iter().map(|case| (case.name.as_str(), (axis.others)(case))).collect();
    groups
        .into_iter()
        .filter_map(|group| {
            let members = cases.iter().filter(|case| (case.name.as_str(), (axis.others)(case)) == group);
            let mut points: Vec<_> =
                members.map(|case| (f64::from((axis.value)(case)), case.ns_median)).collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            let (name, (first, second, _)) = group;
            let others = AXES.iter().filter(|other| other.file != axis.file).map(|other| other.title);
            let fixed: Vec<String> =
                others.zip([first, second]).map(|(title, value)| format!("{value} {title}")).collect();
            (points.len() > 1).then(|| (format!("{name}, {}", fixed.join(", ")), points))
        })
        .collect()
}

fn growth(path: &Path, axis: &Axis, lines: &[Line]) -> Drawn {
    let height = 420 + 14 * u32::try_from(lines.len())?;
    let root = SVGBackend::new(path, (900, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let points = || lines.iter().flat_map(|(_, points)| points);
    let most = points().map(|(_, ns)| *ns).fold(1.0, f64::max);
    let first = points().map(|(x, _)| *x).fold(f64::INFINITY, f64::min);
    let last = points().map(|(x, _)| *x).fold(2.0, f64::max);
    let mut chart = ChartBuilder::on(&root)
        .caption(format!("nanoseconds a packet by number of {}", axis.title), (FONT, 18))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d((first..last * 1.1).log_scale(), 0.0..most * 1.6)?;
    chart.configure_mesh().x_desc(axis.title).y_desc("ns").draw()?;
    for (index, (name, points)) in lines.iter().enumerate() {
        let style: ShapeStyle = Palette99::pick(index).stroke_width(2);
        chart
            .draw_series(LineSeries::new(points.iter().copied(), style))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font((FONT, 11))
        .background_style(WHITE.mix(0.8))
        .draw()?;
    root.present()?;
    Ok(())
}
