//! The macro behind [`super::Config`].

/// Defines, for each section, a struct of settings with defaults and a struct of optional flags with variables, and over them
/// `Config` and `ServerArgs`. Keys, flags, variables, types, defaults and help are written once.
macro_rules! settings {
    ($(
        $(#[doc = $section_doc:literal])*
        $section:ident: $settings:ident, $args:ident {
            $(
                $(#[doc = $doc:literal])*
                [$key:ident, $flag:literal, $env:literal] $type:ty = $default:expr;
            )*
        }
    )*) => {
        $(
            $(#[doc = $section_doc])*
            #[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
            #[serde(deny_unknown_fields)]
            pub struct $settings {
                $(
                    $(#[doc = $doc])*
                    pub $key: $type,
                )*
            }

            impl Default for $settings {
                fn default() -> Self {
                    Self { $($key: $default,)* }
                }
            }

            $(#[doc = $section_doc])*
            #[derive(Debug, Clone, Default, clap::Args, serde::Serialize)]
            #[group(skip)]
            pub struct $args {
                $(
                    $(#[doc = $doc])*
                    #[arg(id = $flag, long = $flag, env = $env, value_delimiter = ',', hide_env = true, num_args = 1)]
                    #[serde(skip_serializing_if = "Option::is_none")]
                    pub $key: Option<$type>,
                )*
            }
        )*

        /// Every setting of a server, with its value.
        #[derive(Debug, Clone, Default, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct Config {
            $(
                $(#[doc = $section_doc])*
                pub $section: $settings,
            )*
        }

        /// Every setting of a server as a flag or a variable.
        #[derive(Debug, Clone, Default, clap::Args, serde::Serialize)]
        pub struct ServerArgs {
            $(
                $(#[doc = $section_doc])*
                #[command(flatten)]
                pub $section: $args,
            )*
        }
    };
}

pub(super) use settings;
