//! The constants of a load: what one interface's program knows of itself and of the overlays.

use bytemuck::Zeroable as _;
use gateway_common::{
    abi::{self, MAX_OVERLAYS, MAX_VLANS, OverlayFlags, VlanPort},
    wire::Be16,
};

use crate::{
    config::{Config, DontFragment, Overlay, SourceCheck},
    kernel::host::{Host, Link},
};

/// The configuration asks for more than the program has room for.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TooMany {
    /// Overlays.
    #[error(
        "{0} overlays are configured, but one gateway serves at most {MAX_OVERLAYS}: remove some [[overlay]]"
    )]
    Overlays(usize),
    /// VLANs of an interface.
    #[error(
        "{0} VLANs of interface {1} have roles, but at most {MAX_VLANS} can: remove some [[interface]] entries"
    )]
    Vlans(usize, String),
}

/// Constants for the program on the device `link` of this host.
///
/// # Errors
///
/// [`TooMany`]: the configuration does not fit.
pub fn constants(config: &Config, host: &Host, link: &Link) -> Result<abi::Config, TooMany> {
    let mut constants = abi::Config {
        ifindex: link.index,
        mac: link.mac.unwrap_or_default(),
        address: host.client_address(config, link).map(Into::into).unwrap_or_default(),
        ..abi::Config::zeroed()
    };

    let mut vlans = Vec::new();
    for interface in config.interfaces.iter().filter(|interface| interface.name == link.name) {
        match interface.vlan {
            None => constants.roles = interface.roles,
            Some(vlan) => vlans.push(VlanPort { vlan, roles: interface.roles }),
        }
    }
    let too_many = || TooMany::Vlans(vlans.len(), link.name.clone());
    constants.vlans.get_mut(..vlans.len()).ok_or_else(too_many)?.copy_from_slice(&vlans);
    constants.vlan_count = u32::try_from(vlans.len()).map_err(|_| too_many())?;

    let overlays: Vec<_> = config.overlays.iter().map(overlay).collect();
    let too_many = || TooMany::Overlays(overlays.len());
    constants.overlays.get_mut(..overlays.len()).ok_or_else(too_many)?.copy_from_slice(&overlays);
    constants.overlay_count = u32::try_from(overlays.len()).map_err(|_| too_many())?;
    Ok(constants)
}

fn overlay(overlay: &Overlay) -> abi::Overlay {
    let switches = [
        (overlay.source_check != SourceCheck::Off, OverlayFlags::SOURCE_CHECK),
        (overlay.allow_gbp, OverlayFlags::ALLOW_GBP),
        (overlay.dont_fragment == DontFragment::Inherit, OverlayFlags::DF_INHERIT),
        (overlay.mss_clamp, OverlayFlags::CLAMP_MSS),
    ];
    let flags = switches
        .into_iter()
        .filter(|(on, _)| *on)
        .fold(OverlayFlags::NONE, |flags, (_, flag)| flags.with(flag));
    abi::Overlay {
        local: overlay.local.into(),
        port: Be16::new(overlay.port),
        mac: overlay.mac,
        vni: overlay.vni,
        subnet: overlay.subnet.network().into(),
        mask: overlay.subnet.netmask().into(),
        flags,
        ..abi::Overlay::zeroed()
    }
}
